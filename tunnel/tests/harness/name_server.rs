//! A name server for tests, over UDP and TCP, that answers as the test wants.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

/// What the server says to a question.
#[derive(Clone, Debug)]
pub(crate) enum Say {
    /// These addresses, of the kind that was asked for, behind an alias; none: the name has no such address.
    Addresses(Vec<IpAddr>),
    /// Over UDP as many as fit, marked as truncated; over TCP all of them.
    Truncated(Vec<IpAddr>),
    /// As `Truncated`; over TCP it hangs up.
    TruncatedOnly(Vec<IpAddr>),
    /// As `Truncated`; over TCP it says nothing.
    TruncatedSilent(Vec<IpAddr>),
    /// Only a response code: 2 is SERVFAIL, 3 NXDOMAIN, 4 NOTIMP, 5 REFUSED.
    Code(u8),
    /// Bytes that are no answer.
    Garbage,
    /// An answer with another identifier, from the right address, then nothing.
    Forged(IpAddr),
    /// Nothing.
    Nothing,
}

/// Some addresses.
pub(crate) fn addresses<const N: usize>(list: [&str; N]) -> Say {
    Say::Addresses(list.iter().map(|text| text.parse().unwrap()).collect())
}

/// A running name server; stops when dropped.
pub(crate) struct NameServer {
    pub(crate) addr: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

type Rule = Arc<dyn Fn(&str, bool) -> Say + Send + Sync>;

impl NameServer {
    /// Listens at `addr`, whose port may be 0. `rule` gets the name in lower case, and whether IPv6 is asked for.
    pub(crate) async fn start(
        addr: SocketAddr,
        rule: impl Fn(&str, bool) -> Say + Send + Sync + 'static,
    ) -> Self {
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind(addr).await.unwrap();
            // Another process may have the same port over UDP.
            match UdpSocket::bind(tcp.local_addr().unwrap()).await {
                Ok(udp) => break (udp, tcp),
                Err(error) => assert_eq!(addr.port(), 0, "{error}"),
            }
        };
        let (addr, rule) = (tcp.local_addr().unwrap(), Arc::new(rule) as Rule);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(udp, rule.clone(), asked.clone()));
        tasks.spawn(serve_tcp(tcp, rule, asked.clone()));
        Self { addr, asked, _tasks: tasks }
    }

    /// What was asked: `udp kbs.example A`.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve_udp(socket: UdpSocket, rule: Rule, asked: Arc<Mutex<Vec<String>>>) {
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
        let question = &buffer[..length];
        let (name, v6) = name_of(question);
        asked.lock().unwrap().push(format!("udp {name} {}", if v6 { "AAAA" } else { "A" }));
        let answer = match rule(&name, v6) {
            Say::Addresses(all) => encode(question, 0, &all),
            Say::Truncated(all) | Say::TruncatedOnly(all) | Say::TruncatedSilent(all) => {
                let mut bytes = encode(question, 0, &all);
                bytes.truncate(512);
                bytes[2] |= 2;
                bytes
            }
            Say::Code(code) => encode(question, code, &[]),
            Say::Garbage => b"garbage".to_vec(),
            Say::Forged(address) => {
                let mut bytes = encode(question, 0, &[address]);
                bytes[0] ^= 1;
                bytes
            }
            Say::Nothing => continue,
        };
        socket.send_to(&answer, from).await.unwrap();
    }
}

async fn serve_tcp(listener: TcpListener, rule: Rule, asked: Arc<Mutex<Vec<String>>>) {
    while let Ok((stream, _)) = listener.accept().await {
        // A client that hangs up early is its own affair.
        let _ = serve_stream(stream, &rule, &asked).await;
    }
}

async fn serve_stream(mut stream: TcpStream, rule: &Rule, asked: &Mutex<Vec<String>>) -> std::io::Result<()> {
    let mut question = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut question).await?;
    let (name, v6) = name_of(&question);
    asked.lock().unwrap().push(format!("tcp {name} {}", if v6 { "AAAA" } else { "A" }));
    match rule(&name, v6) {
        Say::Addresses(all) | Say::Truncated(all) => {
            let answer = encode(&question, 0, &all);
            stream.write_u16(answer.len().try_into().unwrap()).await?;
            stream.write_all(&answer).await?;
        }
        // Until the client hangs up.
        Say::TruncatedSilent(_) => drop(stream.read_u8().await?),
        _ => {}
    }
    Ok(())
}

fn name_of(question: &[u8]) -> (String, bool) {
    let (mut labels, mut at) = (Vec::new(), 12);
    while question[at] != 0 {
        let end = at + 1 + usize::from(question[at]);
        labels.push(String::from_utf8_lossy(&question[at + 1..end]).to_lowercase());
        at = end;
    }
    (labels.join("."), question[at + 2] == 28)
}

fn encode(question: &[u8], code: u8, all: &[IpAddr]) -> Vec<u8> {
    let mut bytes = question.to_vec();
    bytes[2] = 0x81;
    bytes[3] = 0x80 | code;
    if !all.is_empty() {
        bytes[6..8].copy_from_slice(&u16::try_from(all.len() + 1).unwrap().to_be_bytes());
        // An alias: "alias" under the question's name.
        bytes.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 8, 5]);
        bytes.extend(b"alias\xc0\x0c");
    }
    for address in all {
        let (kind, data) = match address {
            IpAddr::V4(ip) => (1, ip.octets().to_vec()),
            IpAddr::V6(ip) => (28, ip.octets().to_vec()),
        };
        bytes.extend([0xc0, 12, 0, kind, 0, 1, 0, 0, 0, 60, 0, data.len().try_into().unwrap()]);
        bytes.extend(data);
    }
    bytes
}
