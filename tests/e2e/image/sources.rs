use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::{script, succeeds, text};

const KEYRING: &str = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg";
/// Sources of other archives, for the host's release.
const OTHERS: [(&str, &str); 3] = [
    (
        "sources.list.d/aa-other.list",
        "deb [arch=amd64 signed-by=/usr/share/keyrings/other-archive-keyring.gpg] https://other.example/debian bookworm main\n\
         deb https://cloud.example/apt cloud-sdk-bookworm main\n",
    ),
    (
        "sources.list.d/another.sources",
        "Types: deb\nURIs: https://another.example/debian\nSuites: bookworm\nComponents: main\nSigned-By: /etc/apt/keyrings/another.gpg\n",
    ),
    ("sources.list.d/docker.list", "deb https://docker.example/linux/debian bookworm stable\n"),
];

/// What is written on a machine with this ID and these files below /etc/apt.
fn written(id: &str, files: &[(&str, &str)]) -> String {
    let root = TempDir::new().unwrap();
    let put = |path: &Path, content: &str| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    };
    put(&root.path().join("etc/os-release"), &format!("VERSION_CODENAME=bookworm\nID={id}\n"));
    for (name, content) in files {
        put(&root.path().join("etc/apt").join(name), content);
    }
    let output = root.path().join("out/mkosi.sources");
    succeeds(script("mkosi/sources"), &["--root", text(root.path()), "--output", text(&output)]);
    fs::read_to_string(output).unwrap()
}

/// The sources of the image with these mirrors.
fn sources(mirror: &str, security: &str) -> String {
    let stanza = |uri: &str, suites: &str| {
        format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\n{KEYRING}\n")
    };
    let (main, security) = (stanza(mirror, "trixie trixie-updates"), stanza(security, "trixie-security"));
    format!("{main}\n{security}")
}

#[test]
fn package_sources_have_the_machines_mirror() {
    let deb822 = "# a comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
        # a comment\nComponents: main non-free-firmware\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
        Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n";
    let one_line = "#deb cdrom:[Debian GNU/Linux 12.5.0 _Bookworm_ - Official amd64 NETINST]/ bookworm main\n\
        deb cdrom:[Debian GNU/Linux 12.5.0 _Bookworm_ - Official amd64 NETINST]/ bookworm main\n\
        deb-src http://sources.example/debian bookworm main\n\
        deb http://mirror.example/debian/ bookworm main non-free-firmware # a comment\n\
        deb [ arch=amd64 ] http://mirror.example/security bookworm-security main\n";
    let list = "deb [signed-by=/usr/share/keyrings/debian-archive-bookworm-stable.gpg] https://mirror.example/debian bookworm main\n";
    let debian_org = "https://deb.debian.org/debian-security";
    for (files, mirror, security) in [
        (
            &[("sources.list.d/debian.sources", deb822)][..],
            "http://mirror.example/debian",
            "http://mirror.example/security",
        ),
        (&[("sources.list", one_line)], "http://mirror.example/debian/", "http://mirror.example/security"),
        (&[("sources.list.d/mirror.list", list)], "https://mirror.example/debian", debian_org),
        (
            &[("sources.list.d/debian.sources", deb822), ("sources.list", list)],
            "http://mirror.example/debian",
            "http://mirror.example/security",
        ),
        (&[("sources.list", "# moved\n")], "https://deb.debian.org/debian", debian_org),
        (&[], "https://deb.debian.org/debian", debian_org),
    ] {
        let files = [files, &OTHERS].concat();
        assert_eq!(written("debian", &files), sources(mirror, security), "{files:?}");
    }
}

#[test]
fn package_sources_are_of_trixie_whatever_the_machine_has() {
    for suite in ["stable", "testing", "sid", "bookworm", "trixie"] {
        let list = format!(
            "deb http://m.example/debian {suite} main\ndeb http://m.example/s {suite}-security main\n"
        );
        let expected = sources("http://m.example/debian", "http://m.example/s");
        assert_eq!(written("debian", &[("sources.list", &list)]), expected);
    }
    // Another distribution's mirror has no Debian.
    let list = "deb http://archive.ubuntu.com/ubuntu jammy main\n";
    let expected = sources("https://deb.debian.org/debian", "https://deb.debian.org/debian-security");
    assert_eq!(written("ubuntu", &[("sources.list", list)]), expected);
}

#[test]
fn a_list_of_mirrors_is_replaced_by_its_first() {
    let deb822 = "Types: deb deb-src\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
        Types: deb deb-src\nURIs: mirror+file:/etc/apt/mirrors/debian-security.list\nSuites: bookworm-security\nComponents: main\n";
    let files = [
        ("sources.list.d/debian.sources", deb822),
        (
            "mirrors/debian.list",
            "# mirrors\n\nhttps://first.example/debian\tpriority:1\nhttps://second.example/debian\n",
        ),
        ("mirrors/debian-security.list", "https://first.example/security\n"),
    ];
    let expected = sources("https://first.example/debian", "https://first.example/security");
    assert_eq!(written("debian", &files), expected);
    // Where it can't be read, a later source has one that can be reached.
    let (list, expected) = (
        "deb file:/srv/debian bookworm main\ndeb http://m.example/debian bookworm main\n",
        sources("http://m.example/debian", "https://deb.debian.org/debian-security"),
    );
    assert_eq!(written("debian", &[files[0], ("sources.list", list)]), expected);
}

#[test]
fn a_mirror_with_its_own_key_keeps_it() {
    let key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBGPL0BUBEADmW5NdOOHwPIJlgPu6JDcKw/NZJPR8lsD3K87ZM18gzyQZJD+w\n -----END PGP PUBLIC KEY BLOCK-----\n";
    let deb822 = format!(
        "Types: deb\nArchitectures: amd64\nURIs:\n http://mirror.example/debian\nSuites: bookworm\n bookworm-security\nComponents: main\n\
         {key}Check-Valid-Until: no\n\nEnabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n"
    );
    let stanza = |suites: &str| {
        format!(
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: {suites}\nComponents: main\n{key}Check-Valid-Until: no\n"
        )
    };
    let expected = [stanza("trixie trixie-updates"), stanza("trixie-security")].join("\n");
    assert_eq!(written("debian", &[("sources.list.d/debian.sources", &deb822)]), expected);
}
