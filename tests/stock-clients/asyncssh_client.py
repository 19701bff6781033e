"""Pipes standard input and output through a tunnel, with asyncssh.

Arguments: HOST PORT USER KEY_FILE HOST_KEY_LINE TUNNEL; HOST_KEY_LINE is the only host key to accept, as in a .pub file.
"""
import asyncio
import sys

import asyncssh


async def main(host, port, user, key_file, host_key_line, tunnel):
    host_keys = ([asyncssh.import_public_key(host_key_line)], [], [])
    async with asyncssh.connect(
        host, int(port), username=user, client_keys=[key_file], known_hosts=host_keys, agent_path=None, config=None
    ) as connection:
        reader, writer = await connection.open_connection(tunnel, 1, encoding=None)

        async def send():
            while data := await asyncio.to_thread(sys.stdin.buffer.read1, 32768):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        sender = asyncio.create_task(send())
        while data := await reader.read(32768):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        await sender


asyncio.run(main(*sys.argv[1:]))
