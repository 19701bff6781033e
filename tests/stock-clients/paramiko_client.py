"""Pipes standard input and output through a tunnel, with paramiko.

Arguments: HOST PORT USER KEY_FILE HOST_KEY_LINE TUNNEL; HOST_KEY_LINE is the only host key to accept, as in a .pub file.
"""
import base64
import sys
import threading

import paramiko


def main(host, port, user, key_file, host_key_line, tunnel):
    host_key = paramiko.Ed25519Key(data=base64.b64decode(host_key_line.split()[1]))
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    client.get_host_keys().add(f"[{host}]:{port}", "ssh-ed25519", host_key)
    client.connect(host, int(port), user, key_filename=key_file, allow_agent=False, look_for_keys=False, timeout=20)
    channel = client.get_transport().open_channel("direct-tcpip", (tunnel, 1), ("127.0.0.1", 0), timeout=20)

    def send():
        while data := sys.stdin.buffer.read1(32768):
            channel.sendall(data)
        channel.shutdown_write()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while data := channel.recv(32768):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    sender.join(20)
    client.close()


main(*sys.argv[1:])
