//! Reads /proc.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};

use super::Process;

/// All processes that still exist when they are read.
pub(super) fn processes() -> Result<Vec<Process>> {
    let entries = fs::read_dir("/proc").context("listing /proc")?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    Ok(pids.filter_map(process).collect())
}

fn process(pid: i32) -> Option<Process> {
    let directory = Path::new("/proc").join(pid.to_string());
    let link = |name: &str| {
        // A zombie has no namespaces.
        let target = fs::read_link(directory.join("ns").join(name)).unwrap_or_default();
        target.to_string_lossy().into_owned()
    };
    let command = fs::read(directory.join("cmdline")).ok()?;
    let command = command.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned());
    let mut command: Vec<_> = command.collect();
    // The last argument is followed by a NUL, too.
    command.pop();
    let comm = fs::read_to_string(directory.join("comm")).ok()?.trim_end().to_owned();
    Some(Process { pid, comm, command, net: link("net"), mnt: link("mnt") })
}

/// The TCP listeners in the network namespace of `pid`.
pub(super) fn listeners(pid: i32) -> Result<Vec<SocketAddr>> {
    let mut listeners = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/{pid}/net/{table}");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        listeners.extend(text.lines().skip(1).filter_map(listener));
    }
    Ok(listeners)
}

/// proc_pid_net(5): the second field is the local address, the fourth the state.
fn listener(line: &str) -> Option<SocketAddr> {
    const LISTEN: &str = "0A";
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    let (ip, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    (state == LISTEN).then_some(SocketAddr::new(address(ip)?, port))
}

/// Words of 32 bits as in the kernel's memory, little-endian on the supported machines.
fn address(hex: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let digits = hex.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_le_bytes())
    };
    if hex.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let bytes: Vec<u8> = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_from_the_kernels_tables() {
        let v4 =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1";
        assert_eq!(listener(v4).unwrap().to_string(), "127.0.0.1:8080");
        let v6 = "   0: 00000000000000000000000000000000:08AE 0000:0000 0A 00000000:00000000 00:00000000";
        assert_eq!(listener(v6).unwrap().to_string(), "[::]:2222");
        let established = v4.replace(" 0A ", " 01 ");
        assert_eq!(listener(&established), None);
        assert_eq!(listener("garbage"), None);
    }

    #[test]
    fn a_listener_of_this_process_is_found() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(listeners(pid).unwrap().contains(&socket.local_addr().unwrap()));
        let own = processes().unwrap().into_iter().find(|process| process.pid == pid).unwrap();
        assert!(!own.command.is_empty() && own.net.starts_with("net:["), "{own:?}");
    }
}
