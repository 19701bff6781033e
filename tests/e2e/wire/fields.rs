//! Fields with a wrong length, without text, or with senseless values; most of them before a login.

use anyhow::{Context, Result, ensure};
use secure_comms_protocol::limits::AUTH_TRIES;
use secure_comms_tests::attackers::attacked_agent::{AttackedAgent, answers};
use secure_comms_tests::attackers::raw::{Key, Offer, Packet, Raw, message};
use secure_comms_tests::harness::scene::PATIENCE;

/// A small random generator (xorshift64*): the same junk in each run.
struct Junk(u64);

impl Junk {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// The same with some bits inverted, truncated, or with a wrong length.
    fn spoil(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(3) {
            if bytes.len() < 8 {
                break;
            }
            let at = 1 + self.below(bytes.len() - 5);
            match self.below(5) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => bytes.truncate(at),
                3 => bytes[at..at + 4].copy_from_slice(&(self.below(3) as u32).wrapping_sub(1).to_be_bytes()),
                _ => bytes.insert(at, self.next() as u8),
            }
        }
        bytes
    }
}

/// A connection that waits for a login.
async fn asked(attacked: &AttackedAgent) -> Result<Raw> {
    let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
    raw.ask_to_authenticate().await?;
    Ok(raw)
}

/// Public keys and certificates of every kind that a library might parse, well-formed and malformed.
fn keys() -> Vec<(&'static str, Packet)> {
    let none = || Packet::whole(vec![]);
    let certificate = |kind: &'static str, key: Packet| {
        let body = none().string(kind).string([1; 32]).bytes(key.payload());
        let body = body
            .bytes(&1_u64.to_be_bytes())
            .uint(1)
            .string("id")
            .string(none().string("kubernetes").payload());
        // Valid without end, with an invalid signature of its own.
        let body =
            body.bytes(&0_u64.to_be_bytes()).bytes(&u64::MAX.to_be_bytes()).string("").string("").string("");
        let own = none().string("ssh-ed25519").string([2; 32]);
        body.string(own.payload()).string(none().string("ssh-ed25519").string([3; 64]).payload())
    };
    vec![
        ("ssh-ed25519", none().string("ssh-ed25519").string([0; 32])),
        ("ssh-ed25519", none().string("ssh-ed25519").string([0xff; 32])),
        ("ssh-ed25519", none().string("ssh-ed25519").string([1; 31])),
        ("ssh-ed25519", none().string("ssh-rsa").string([1; 3]).string([1; 256])),
        ("ssh-rsa", none().string("ssh-rsa").string([1, 0, 1]).string([0; 1])),
        ("rsa-sha2-512", none().string("ssh-rsa").string([]).string([])),
        ("rsa-sha2-256", none().string("ssh-rsa").string([0x80]).string([0xff; 100_000])),
        ("ssh-dss", none().string("ssh-dss").string([1]).string([0]).string([]).string([1; 20])),
        ("ecdsa-sha2-nistp256", none().string("ecdsa-sha2-nistp256").string("nistp256").string([4; 65])),
        ("ecdsa-sha2-nistp256", none().string("ecdsa-sha2-nistp256").string("nistp521").string([4])),
        ("ecdsa-sha2-nistp521", none().string("ecdsa-sha2-nistp521").string("nistp521").string([])),
        (
            "sk-ssh-ed25519@openssh.com",
            none().string("sk-ssh-ed25519@openssh.com").string([1; 32]).string("ssh:"),
        ),
        (
            "sk-ecdsa-sha2-nistp256@openssh.com",
            none()
                .string("sk-ecdsa-sha2-nistp256@openssh.com")
                .string("nistp256")
                .string([4; 65])
                .string("ssh:"),
        ),
        (
            "ssh-ed25519-cert-v01@openssh.com",
            certificate("ssh-ed25519-cert-v01@openssh.com", none().string([1; 32])),
        ),
        (
            "ecdsa-sha2-nistp256-cert-v01@openssh.com",
            certificate(
                "ecdsa-sha2-nistp256-cert-v01@openssh.com",
                none().string("nistp256").string([4; 65]),
            ),
        ),
        (
            "ssh-rsa-cert-v01@openssh.com",
            certificate("ssh-rsa-cert-v01@openssh.com", none().string([3]).string([5; 256])),
        ),
        ("", none()),
        ("x509v3-sign-rsa", none().string("x509v3-sign-rsa").string([0x30; 100])),
        ("unheard-of@example.org", none().string("unheard-of@example.org").string([7; 100_000])),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_worker_nodes_key_is_accepted() -> Result<()> {
    for attacked in [AttackedAgent::attestation().await?, AttackedAgent::kubernetes().await?] {
        for (algorithm, key) in keys() {
            for user in ["kubernetes", "attestation"] {
                for signed in [false, true] {
                    let request = Packet::authenticate(user, "publickey").byte(signed.into());
                    let mut request = request.string(algorithm).string(key.payload());
                    if signed {
                        let signature = Packet::whole(vec![]).string(algorithm).string([9; 64]);
                        request = request.string(signature.payload());
                    }
                    let mut raw = asked(&attacked).await?;
                    // Refused, or ended if it can't be parsed.
                    let let_in = raw.authenticate(&request).await.unwrap_or(false);
                    ensure!(!let_in, "{user}: {algorithm} is let in");
                    attacked.holds()?;
                }
            }
        }
        attacked.comes_up().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn spoiled_logins_are_refused_or_end_their_connection() -> Result<()> {
    const SEED: u64 = 0x5eed_0001;
    let attacked = AttackedAgent::kubernetes().await?;
    let stranger = Key::generate()?;
    let mut junk = Junk(SEED);
    for number in 0..600 {
        let mut raw = asked(&attacked).await?;
        let (_, key) = &keys()[junk.below(keys().len())];
        let packet = match junk.below(4) {
            0 => stranger.login("kubernetes", raw.session()),
            1 => Packet::authenticate("kubernetes", "keyboard-interactive").string("").string("pam"),
            2 => Packet::authenticate("kubernetes", "password").byte(1).string("a").string("b"),
            _ => {
                let (algorithm, _) = keys()[junk.below(keys().len())];
                Packet::authenticate("kubernetes", "publickey")
                    .byte(0)
                    .string(algorithm)
                    .string(key.payload())
            }
        };
        let spoiled = Packet::whole(junk.spoil(packet.payload()));
        let let_in = raw.authenticate(&spoiled);
        // Some of them are no longer requests and get no answer; the next message does.
        let let_in = tokio::time::timeout(std::time::Duration::from_millis(300), let_in).await;
        ensure!(!matches!(let_in, Ok(Ok(true))), "{number}: {spoiled:?} is let in");
        attacked.holds().with_context(|| format!("seed {SEED:#x}, number {number}: {spoiled:?}"))?;
    }
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn spoiled_handshakes_and_requests_are_not_accepted() -> Result<()> {
    const SEED: u64 = 0x5eed_0002;
    let attacked = AttackedAgent::attestation().await?;
    let mut junk = Junk(SEED);
    for number in 0..500 {
        let mut raw = Raw::connect(attacked.scene.ssh).await?;
        raw.identify().await?;
        raw.send(&Packet::whole(junk.spoil(Offer::default().packet().payload()))).await?;
        // A bit of the cookie may be inverted: then the hashes of both ends differ, and so do the keys.
        drop(raw.send(&Packet::new(message::KEX_ECDH_INIT).string([1; 32])).await);
        drop(raw.send(&Packet::new(message::NEWKEYS)).await);
        drop(raw.write(&[0; 64]).await);
        raw.ends().await.with_context(|| format!("seed {SEED:#x}, handshake {number}"))?;
        attacked.holds()?;
    }
    let mut raw = Raw::attestation(attacked.scene.ssh).await?;
    for number in 0..3000 {
        let packets = [
            Packet::open("session", 1),
            Packet::open("direct-tcpip", 3).string("KATAAGENT").uint(1).string("127.0.0.1").uint(1),
            Packet::open("x11", 1).string("127.0.0.1").uint(6000),
            Packet::global("tcpip-forward").string("KBS").uint(1),
            Packet::request(2, "pty-req")
                .string("xterm")
                .uint(1)
                .uint(1)
                .uint(0)
                .uint(0)
                .string([1, 0, 0, 0, 1, 0]),
            Packet::request(2, "subsystem").string("secure-comms"),
            Packet::request(2, "x11-req").byte(0).string("MIT").string("00").uint(0),
            Packet::data(2, b"{\"ping\":1}\n"),
            Packet::new(message::CHANNEL_EXTENDED_DATA).uint(2).uint(1).string("x"),
            Packet::new(message::CHANNEL_WINDOW_ADJUST).uint(2).uint(u32::MAX),
            Packet::new(message::CHANNEL_OPEN_FAILURE).uint(2).uint(1).string("no").string("en"),
            Packet::new(message::DISCONNECT).uint(11).string("bye").string("en"),
            Offer::default().packet(),
        ];
        let chosen = junk.below(packets.len());
        let packet = Packet::whole(junk.spoil(packets[chosen].payload()));
        if raw.send(&packet).await.is_err() || junk.below(4) == 0 && answers(&mut raw).await.is_err() {
            raw = Raw::attestation(attacked.scene.ssh).await?;
        }
        attacked.holds().with_context(|| format!("seed {SEED:#x}, request {number}: {packet:?}"))?;
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_are_none_and_lengths_that_lie_end_a_login() -> Result<()> {
    let attacked = AttackedAgent::attestation().await?;
    let lies = [
        Packet::new(message::SERVICE_REQUEST).uint(u32::MAX).bytes(b"ssh-userauth"),
        Packet::new(message::SERVICE_REQUEST).uint(13).bytes(b"ssh-userauth"),
        Packet::new(message::SERVICE_REQUEST).string([0xff; 12]),
        Packet::new(message::SERVICE_REQUEST).string("ssh-userauth").byte(0),
    ];
    for packet in &lies {
        let mut raw = Raw::secured(attacked.scene.ssh, Offer::default()).await?;
        raw.send(packet).await?;
        raw.ends().await.with_context(|| format!("{packet:?}"))?;
    }
    let lies = [
        Packet::new(message::USERAUTH_REQUEST).uint(u32::MAX).bytes(b"attestation"),
        Packet::new(message::USERAUTH_REQUEST).string([0xff, 0xfe]).string("ssh-connection").string("none"),
        Packet::new(message::USERAUTH_REQUEST).string("attestation").string("ssh-userauth").string("none"),
        Packet::new(message::USERAUTH_REQUEST).string("attestation").string("").string("none"),
        Packet::authenticate("attestation", "none").byte(0),
        Packet::authenticate("attestation", "publickey").byte(1).uint(0x7fff_ffff),
        Packet::authenticate("attestation", "publickey").byte(0).string("ssh-ed25519").uint(u32::MAX),
    ];
    for packet in &lies {
        let mut raw = asked(&attacked).await?;
        raw.send(packet).await?;
        raw.ends().await.with_context(|| format!("{packet:?}"))?;
    }
    let long = "a".repeat(200_000);
    for user in [
        "",
        "root",
        "kubernetes",
        "attestation ",
        "Attestation",
        "attestation\0",
        "att\u{202e}estation",
        &long,
    ] {
        for method in ["none", "password", "hostbased", "gssapi-with-mic", "publickey", "", &long] {
            let mut raw = asked(&attacked).await?;
            let let_in = raw.authenticate(&Packet::authenticate(user, method)).await.unwrap_or(false);
            ensure!(!let_in, "{user:.20}, {method:.20}");
        }
    }
    attacked.holds_and_attests().await?;
    attacked.comes_up().await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_login_attempts_end_the_connection() -> Result<()> {
    let attacked = AttackedAgent::kubernetes().await?;
    for packet in [
        Packet::authenticate("kubernetes", "none"),
        Packet::authenticate("kubernetes", "password").byte(0).string("guess"),
        Packet::authenticate("kubernetes", "unheard-of"),
        Packet::new(message::USERAUTH_INFO_RESPONSE).uint(0),
        Key::generate()?.login("kubernetes", b"another session"),
    ] {
        let mut raw = asked(&attacked).await?;
        let mut tries = 0;
        while let Ok(let_in) = raw.authenticate(&packet).await {
            ensure!(!let_in, "{packet:?} is let in");
            tries += 1;
            ensure!(tries <= AUTH_TRIES, "{packet:?}: try {tries}");
        }
        raw.ends().await?;
    }
    // Queries about a key are free, without limit until the authentication timeout.
    let node = attacked.node_key()?;
    let mut raw = asked(&attacked).await?;
    let probe =
        Packet::authenticate("kubernetes", "publickey").byte(0).string("ssh-ed25519").string(node.public());
    let probing = async {
        while raw.send(&probe).await.is_ok() && raw.expect(&[message::USERAUTH_PK_OK]).await.is_ok() {}
    };
    tokio::time::timeout(PATIENCE, probing).await.context("queries are answered without a limit")?;
    attacked.comes_up().await.map(drop)
}
