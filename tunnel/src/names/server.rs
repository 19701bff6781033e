//! Asks name servers: over UDP, and over TCP when an answer does not fit.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use secure_comms_protocol::limits::NAME_GRACE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::message::{Answer, Question, Reply};

/// Longest answer over UDP. We allow the servers 512 bytes; some send more.
const DATAGRAM_MAX: usize = 4096;

/// Why a server gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServerFault {
    server: SocketAddr,
    fault: String,
}

impl fmt::Display for ServerFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "name server {}: {}", self.server.ip(), self.fault)
    }
}

/// Asks `server`, over TCP only if `tcp`. Dropping the future closes the sockets.
///
/// # Errors
/// No answer within `limit`, or one that says that the server has none.
pub(super) async fn ask(
    server: SocketAddr,
    question: Question,
    tcp: bool,
    limit: Duration,
) -> Result<Answer, ServerFault> {
    let asked =
        async { if tcp { over_tcp(server, &question).await } else { over_udp(server, &question).await } };
    let result = match timeout(limit, asked).await {
        Ok(Ok(Reply::Answer(answer))) => return Ok(answer),
        // Over TCP there is nothing that it could not fit into.
        Ok(Ok(Reply::Truncated(found))) if !found.is_empty() => return Ok(Answer::Addresses(found)),
        Ok(Ok(Reply::Fault(fault))) => Err(fault),
        Ok(Ok(Reply::Truncated(_) | Reply::Unrelated)) => Err("a useless answer".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
    };
    result.map_err(|fault| ServerFault { server, fault })
}

async fn over_udp(server: SocketAddr, question: &Question) -> io::Result<Reply> {
    let local: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // Connected: datagrams from elsewhere do not arrive, and an ICMP error ends the wait.
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    socket.send(question.bytes()).await?;
    let mut buffer = vec![0; DATAGRAM_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match question.reply(buffer.get(..length).unwrap_or_default()) {
            // A late answer to an earlier question, or a forged one.
            Reply::Unrelated => {}
            Reply::Truncated(fitted) => {
                if fitted.is_empty() {
                    return over_tcp(server, question).await;
                }
                return Ok(match timeout(NAME_GRACE, over_tcp(server, question)).await {
                    Ok(Ok(whole @ Reply::Answer(_))) => whole,
                    // Some servers have no TCP, or a firewall drops it. What fitted is enough.
                    _ => Reply::Truncated(fitted),
                });
            }
            reply => return Ok(reply),
        }
    }
}

async fn over_tcp(server: SocketAddr, question: &Question) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.bytes().len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), question.bytes()].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(question.reply(&answer))
}
