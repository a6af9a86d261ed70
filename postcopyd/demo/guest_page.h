// SPDX-License-Identifier: Apache-2.0
/* Part of guest_init.c: what a page of test memory, or a block of the disk, holds. */

/* The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom generators). */
static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t seed_of(uint64_t index, uint32_t version)
{
    return mix(mix(index + GOLDEN) ^ version);
}

static uint64_t table_term(uint64_t index, uint32_t version)
{
    return mix(seed_of(index, version) + 1);
}

/* Number, version, then a Weyl sequence from a seed of both: one addition for each word, and no two
 * words of all pages and versions are alike except by chance. */
static void fill(uint64_t *words, uint64_t index, uint32_t version)
{
    uint64_t word = seed_of(index, version);
    words[0] = index;
    words[1] = version;
    for (unsigned i = 2; i < WORDS; i++)
        words[i] = word += GOLDEN;
}

/* What word `i` of a page must be. */
static uint64_t expected_word(uint64_t index, uint32_t version, unsigned i)
{
    if (version == 0)
        return 0;
    if (i < 2)
        return i == 0 ? index : version;
    return seed_of(index, version) + (i - 1) * GOLDEN;
}

/* Every word is read and compared; no early end, which would be slower where all is well. */
static bool right(const uint64_t *words, uint64_t index, uint32_t version)
{
    uint64_t wrong = 0;
    if (version == 0) {
        for (unsigned i = 0; i < WORDS; i++)
            wrong |= words[i];
        return wrong == 0;
    }
    uint64_t word = seed_of(index, version);
    wrong = (words[0] ^ index) | (words[1] ^ version);
    for (unsigned i = 2; i < WORDS; i++)
        wrong |= words[i] ^ (word += GOLDEN);
    return wrong == 0;
}

static void describe(const char *what, const uint64_t *words, uint64_t index, uint32_t version)
{
    if (atomic_fetch_add(&details, 1) >= MAX_DETAILS)
        return;
    unsigned first = WORDS, wrong = 0;
    for (unsigned i = 0; i < WORDS; i++) {
        if (words[i] == expected_word(index, version, i))
            continue;
        wrong++;
        if (first == WORDS)
            first = i;
    }
    if (first == WORDS) { /* wrong when checked, right when read again: the worst kind */
        say("pc bad what=%s kind=unstable page=%llu version=%u\n", what, (unsigned long long)index,
            version);
        return;
    }
    const char *kind = "torn";
    uint64_t found_index = words[0], found_version = words[1];
    if (right(words, index, 0))
        kind = "zero";
    else if (found_version > 0 && found_version <= UINT32_MAX &&
             right(words, found_index, (uint32_t)found_version))
        kind = found_index != index ? "foreign" : found_version < version ? "stale" : "future";
    say("pc bad what=%s kind=%s page=%llu version=%u found_page=%llu found_version=%llu "
        "wrong_words=%u offset=%zu expected=%016llx found=%016llx\n",
        what, kind, (unsigned long long)index, version, (unsigned long long)found_index,
        (unsigned long long)found_version, wrong, first * sizeof *words,
        (unsigned long long)expected_word(index, version, first), (unsigned long long)words[first]);
}
