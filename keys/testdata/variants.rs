//! Texts of keys as people and tools leave them, for the tests of every reader: `keys/`, the agent's config, the adaptor's store
//! and its KBS client.

/// A text, and what it is.
pub(crate) type Variant = (String, Vec<u8>);

const OPENSSH: &str = include_str!("ed25519.openssh");
const PKCS8: &str = include_str!("ed25519.pkcs8");
const PUBLIC: &str = include_str!("ed25519.pub");

/// Edits that leave a key readable, of a text in lines.
fn edits(text: &str) -> Vec<(&'static str, Vec<u8>)> {
    let lines = |edit: &dyn Fn(&str) -> String| text.lines().map(edit).collect::<String>().into_bytes();
    vec![
        ("as it is", text.into()),
        ("CRLF", lines(&|line| format!("{line}\r\n"))),
        ("no newline at the end", text.trim_end().into()),
        ("a byte order mark", format!("\u{feff}{text}").into()),
        ("blank lines around", format!("\n \n\t\n{text}\n\n  \n").into()),
        ("trailing blanks", lines(&|line| format!("{line} \t \n"))),
        ("indented by blanks", lines(&|line| format!("    {line}\n"))),
        ("indented by tabs", lines(&|line| format!("\t{line}\n"))),
    ]
}

/// Texts with the private key of `ed25519.openssh` or `ed25519.pkcs8`.
pub(crate) fn private_keys() -> Vec<Variant> {
    let mut variants = Vec::new();
    for (format, pem) in [("OpenSSH", OPENSSH), ("PKCS#8", PKCS8)] {
        let certificate = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let around = |before: &[u8], after: &[u8]| [before, pem.as_bytes(), after].concat();
        let bag = b"Bag Attributes\n    friendlyName: kbs\n    localKeyID: 54 69\nKey Attributes: <No Attributes>\n";
        let others = [
            ("Bag Attributes", around(bag, b"")),
            ("a comment in UTF-8", around("# Schlüssel für den KBS\n".as_bytes(), b"")),
            ("a comment in latin-1", around(b"# Schl\xfcssel f\xfcr den KBS\n", b"# Ende: gr\xfcn\n")),
            ("a remark about PEM", around(b"# from -----BEGIN to -----END, both included\n", b"")),
            ("a certificate before", around(certificate.as_bytes(), b"")),
            ("a certificate after", around(b"", certificate.as_bytes())),
            (
                "a public key after",
                around(b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
            ),
        ];
        let all = edits(pem).into_iter().chain(others);
        variants.extend(all.map(|(edit, text)| (format!("{format}: {edit}"), text)));
    }
    variants
}

/// Texts without one private key that is meant, and what an error says of each.
pub(crate) fn no_private_keys() -> Vec<(Vec<u8>, &'static str)> {
    vec![
        ([OPENSSH, PKCS8].concat().into(), "more than one private key in it"),
        ([PKCS8, include_str!("ecdsa.pkcs8")].concat().into(), "more than one private key in it"),
        ([&[0xff, 0xfe], &*utf_16(OPENSSH)].concat(), "not text"),
        (utf_16(PKCS8), "not text"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into(), "a 'CERTIFICATE' is not"),
        (include_bytes!("encrypted.pkcs8").into(), "it is encrypted"),
        (include_bytes!("rsa.openssh").into(), "ssh-rsa is not an Ed25519 key"),
        (PUBLIC.into(), "not PEM"),
    ]
}

fn utf_16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Texts with the public key of `ed25519.pub`, once or more.
pub(crate) fn authorized_keys() -> Vec<Variant> {
    let mut words = PUBLIC.split_whitespace();
    let (kind, key) = (words.next().unwrap(), words.next().unwrap());
    let line = format!("{kind} {key} node@example\n");
    let mut variants: Vec<Variant> =
        edits(&line).into_iter().map(|(edit, text)| (edit.to_owned(), text)).collect();
    for (what, text) in [
        ("a tab", format!("{kind}\t{key}\n").into_bytes()),
        ("two blanks", format!("{kind}  {key}  wn\n").into_bytes()),
        ("blanks and tabs", format!(" \t{kind} \t\t {key}\t \tnode  a\t\n").into_bytes()),
        ("no comment", format!("{kind} {key}").into_bytes()),
        ("a long comment", format!("{kind} {key} {}\n", "of the node ".repeat(100)).into_bytes()),
        ("a comment in UTF-8", format!("{kind} {key} Knoten Süd\n").into_bytes()),
        ("a comment in latin-1", [format!("{kind} {key} Knoten S").as_bytes(), b"\xfcd\n"].concat()),
        ("a comment line in latin-1", [b"# Knoten S\xfcd\n", line.as_bytes()].concat()),
        ("an indented comment line", format!("  # node\n\t#{line}{line}").into_bytes()),
        ("the key twice", format!("{line}\r\n{kind}\t{key}\n").into_bytes()),
        ("a comment that looks like a key", format!("{kind} {key} ssh-rsa AAAA\n").into_bytes()),
    ] {
        variants.push((what.to_owned(), text));
    }
    variants
}
