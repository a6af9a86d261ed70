# SPDX-License-Identifier: Apache-2.0
"""Varlink (https://varlink.org, UAPI.20): `idl` reads interface files and holds values against
them, `server` serves a unix socket on trio, `client` is a blocking client. Knows nothing of who
uses it, and can be copied elsewhere as it is; it needs trio and structlog, the client neither.

By hand, as the libraries that there are serve by threads (`varlink`) or on asyncio
(`asyncvarlink`). The tests speak to this one with both.

A service, and a call of it:

    import socket, trio
    from . import client, idl, server

    CLOCK = '''
    interface org.example.clock
    method Wait(seconds: float) -> (waited: float)
    '''

    async def wait(call):
        await trio.sleep(call.parameters["seconds"])
        return {"waited": call.parameters["seconds"]}

    async def main(path):
        service = server.Service(
            [idl.parse_interface(CLOCK)], {"org.example.clock.Wait": wait},
            product="clock", version="1",
        )
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        await server.serve(listener, service)

    def ask(path):
        with client.Client(path) as clock:
            return clock.call("org.example.clock.Wait", seconds=0.1)
"""
