/* Pipes standard input and output through a tunnel, with libssh.
 *
 * Arguments: HOST PORT USER KEY_FILE HOST_KEY_LINE TUNNEL; HOST_KEY_LINE is the only host key to accept, as in a .pub
 * file. */
#include <libssh/libssh.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static ssh_session session;

static void fail(const char *step) {
    fprintf(stderr, "%s: %s\n", step, session ? ssh_get_error(session) : "no session");
    exit(1);
}

/* Whether the server has proven the key of this line. */
static int is_expected_host_key(const char *line) {
    char type[64], base64[512];
    ssh_key expected = NULL, shown = NULL;
    if (sscanf(line, "%63s %511s", type, base64) != 2) return 0;
    if (ssh_pki_import_pubkey_base64(base64, ssh_key_type_from_name(type), &expected) != SSH_OK) return 0;
    if (ssh_get_server_publickey(session, &shown) != SSH_OK) return 0;
    int same = ssh_key_cmp(expected, shown, SSH_KEY_CMP_PUBLIC) == 0;
    ssh_key_free(expected);
    ssh_key_free(shown);
    return same;
}

static void write_all(const char *data, int length) {
    while (length > 0) {
        ssize_t written = write(STDOUT_FILENO, data, length);
        if (written <= 0) fail("writing standard output");
        data += written;
        length -= written;
    }
}

int main(int argc, char **argv) {
    if (argc != 7) {
        fprintf(stderr, "expected 6 arguments\n");
        return 2;
    }
    char buffer[32768];
    int process_config = 0;
    long timeout = 20;
    ssh_key key = NULL;
    session = ssh_new();
    if (session == NULL) fail("ssh_new");
    ssh_options_set(session, SSH_OPTIONS_HOST, argv[1]);
    ssh_options_set(session, SSH_OPTIONS_PORT_STR, argv[2]);
    ssh_options_set(session, SSH_OPTIONS_USER, argv[3]);
    ssh_options_set(session, SSH_OPTIONS_PROCESS_CONFIG, &process_config);
    ssh_options_set(session, SSH_OPTIONS_TIMEOUT, &timeout);
    if (ssh_connect(session) != SSH_OK) fail("connecting");
    if (!is_expected_host_key(argv[5])) fail("another host key");
    if (ssh_pki_import_privkey_file(argv[4], NULL, NULL, NULL, &key) != SSH_OK) fail("reading the key");
    if (ssh_userauth_publickey(session, NULL, key) != SSH_AUTH_SUCCESS) fail("authenticating");
    ssh_key_free(key);
    ssh_channel channel = ssh_channel_new(session);
    if (channel == NULL || ssh_channel_open_forward(channel, argv[6], 1, "127.0.0.1", 0) != SSH_OK) fail("opening");

    int sending = 1;
    while (!ssh_channel_is_eof(channel)) {
        struct pollfd input = {.fd = sending ? STDIN_FILENO : -1, .events = POLLIN};
        if (poll(&input, 1, 0) > 0) {
            ssize_t got = read(STDIN_FILENO, buffer, sizeof buffer);
            if (got < 0) fail("reading standard input");
            if (got == 0) {
                sending = 0;
                if (ssh_channel_send_eof(channel) != SSH_OK) fail("ending the stream");
            }
            for (ssize_t sent = 0; sent < got;) {
                int wrote = ssh_channel_write(channel, buffer + sent, got - sent);
                if (wrote < 0) fail("writing the stream");
                sent += wrote;
            }
        }
        int got = ssh_channel_read_timeout(channel, buffer, sizeof buffer, 0, sending ? 1 : 100);
        if (got == SSH_ERROR) fail("reading the stream");
        if (got > 0) write_all(buffer, got);
    }
    ssh_channel_free(channel);
    ssh_disconnect(session);
    ssh_free(session);
    return 0;
}
