//! `hosts(5)`: names that no name server is asked for.

use std::net::SocketAddr;

use super::settings::socket_address;

/// The addresses of `name` in a hosts file, in the order of the file; `name` has no dot at its end.
pub(super) fn find(text: &str, name: &str) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let line = line.split_once('#').map_or(line, |(before, _)| before);
        let mut words = line.split_whitespace();
        let Some(address) = words.next().and_then(|word| socket_address(word, 0)) else { continue };
        if words.any(|word| word.eq_ignore_ascii_case(name)) && !found.contains(&address) {
            found.push(address);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_file_is_read_as_libc_reads_it() {
        let text = "127.0.0.1 localhost\n# 10.0.0.9 kbs\n10.0.0.1\tKBS.example  kbs # kbs2\r\n\nx kbs\n::5 kbs\n10.0.0.1 kbs";
        let found =
            |name| find(text, name).iter().map(|address| address.ip().to_string()).collect::<Vec<_>>();
        assert_eq!(found("kbs"), ["10.0.0.1", "::5"]);
        assert_eq!(found("Kbs.Example"), ["10.0.0.1"]);
        assert!(found("kbs2").is_empty() && found("10.0.0.1").is_empty());
    }
}
