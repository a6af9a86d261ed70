/* SPDX-License-Identifier: Apache-2.0 */
/* The page frame: the one message of the data connections, in both directions.
 *
 * It is a msgpack array [kind, region, page, count, payload] whose five items always use the same
 * encodings, so that the 24 bytes before the payload have fixed places and C can check them by
 * comparing marks. All numbers are big-endian, as msgpack has them:
 *
 *    0  0x95        array of 5
 *    1  kind        1 request (destination to source); 2 pages, 3 zero, 4 lost: cannot be read
 *                   (source to destination; lost only where both have the feature "losses")
 *    2  0xcd u16    region, index in the offer
 *    5  0xcf u64    first page, in pages of the region's page size
 *   14  0xce u32    count of pages, at least 1
 *   19  0xc6 u32    bytes of payload: count * page size for pages, 0 otherwise
 *   24              payload
 *
 * postcopyd/protocol.py has the same in Python; tests compare the two. */
#ifndef POSTCOPYD_WIRE_H
#define POSTCOPYD_WIRE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

enum { FRAME_BYTES = 24, FRAME_MAX_PAYLOAD = 2 << 20 };
enum frame_kind { FRAME_REQUEST = 1, FRAME_PAGES = 2, FRAME_ZERO = 3, FRAME_LOST = 4 };

struct frame {
  uint64_t page;
  uint32_t count, payload;
  uint16_t region;
  uint8_t kind;
};

static inline void frame_encode(uint8_t out[FRAME_BYTES], const struct frame *f) {
  uint16_t region = htobe16(f->region);
  uint64_t page = htobe64(f->page);
  uint32_t count = htobe32(f->count), payload = htobe32(f->payload);
  out[0] = 0x95, out[1] = f->kind, out[2] = 0xcd, out[5] = 0xcf, out[14] = 0xce, out[19] = 0xc6;
  memcpy(out + 3, &region, 2), memcpy(out + 6, &page, 8);
  memcpy(out + 15, &count, 4), memcpy(out + 20, &payload, 4);
}

/* Returns 0, or -1 when the bytes are not a frame at all. Does not check whether region, page and
 * count fit the guest: frame_fits() does, with what the receiver knows. */
static inline int frame_decode(const uint8_t in[FRAME_BYTES], struct frame *f) {
  uint16_t region;
  uint64_t page;
  uint32_t count, payload;
  if (in[0] != 0x95 || in[2] != 0xcd || in[5] != 0xcf || in[14] != 0xce || in[19] != 0xc6)
    return -1;
  memcpy(&region, in + 3, 2), memcpy(&page, in + 6, 8);
  memcpy(&count, in + 15, 4), memcpy(&payload, in + 20, 4);
  f->kind = in[1], f->region = be16toh(region), f->page = be64toh(page);
  f->count = be32toh(count), f->payload = be32toh(payload);
  if (f->kind < FRAME_REQUEST || f->kind > FRAME_LOST || f->payload > FRAME_MAX_PAYLOAD)
    return -1;
  return 0;
}

/* Whether a frame lies within a region of `pages` pages and its payload has the right length. */
static inline int frame_fits(const struct frame *f, uint64_t pages, uint32_t page_size) {
  if (f->count == 0 || f->page >= pages || f->count > pages - f->page)
    return 0;
  return f->payload == (f->kind == FRAME_PAGES ? (uint64_t)f->count * page_size : 0);
}

#endif
