//! Archives that systemd-stub makes of a UKI's sections and hands to the kernel behind the initrd (systemd's
//! src/boot/cpio.c): a directory, one file, a trailer.

/// Archive with `content` as the file /.extra/`name`.
pub fn extra(name: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, 1, 0o040_555, ".extra", &[]);
    entry(&mut archive, 2, 0o100_444, &format!(".extra/{name}"), content);
    entry_raw(&mut archive, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0], "TRAILER!!!", &[]);
    archive
}

/// Appends `part` and pads with zeros to a multiple of four, as systemd-stub joins archives.
pub fn join(archives: &mut Vec<u8>, part: &[u8]) {
    archives.extend_from_slice(part);
    pad(archives);
}

fn entry(archive: &mut Vec<u8>, inode: usize, mode: usize, name: &str, content: &[u8]) {
    let fields = [inode, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    entry_raw(archive, fields, name, content);
}

fn entry_raw(archive: &mut Vec<u8>, fields: [usize; 13], name: &str, content: &[u8]) {
    archive.extend_from_slice(b"070701");
    for field in fields {
        // The stub writes lower-case digits, but for the trailer, whose one letter is upper-case.
        let digits = if name == "TRAILER!!!" { format!("{field:08X}") } else { format!("{field:08x}") };
        archive.extend_from_slice(digits.as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::{extra, join};

    #[test]
    fn an_archive_is_a_directory_a_file_and_a_trailer() {
        let archive = extra("os-release", b"ID=podvm");
        let text = String::from_utf8(archive.clone()).unwrap();
        let names: Vec<_> = text.split('\0').filter(|part| !part.is_empty()).collect();
        assert_eq!(
            names,
            [
                concat!(
                    "070701000000010000416d00000000000000000000000100000000000000",
                    "00000000000000000000000000000000000000000700000000.extra",
                ),
                concat!(
                    "070701000000020000812400000000000000000000000100000000000000",
                    "08000000000000000000000000000000000000001200000000.extra/os-",
                    "release",
                ),
                concat!(
                    "ID=podvm0707010000000000000000000000000000000000000001000000",
                    "0000000000000000000000000000000000000000000000000B00000000TR",
                    "AILER!!!",
                ),
            ]
        );
        assert_eq!(archive.len() % 4, 0);
    }

    #[test]
    fn joined_archives_begin_at_multiples_of_four() {
        let mut joined = Vec::new();
        join(&mut joined, b"12345");
        join(&mut joined, b"6");
        assert_eq!(joined, b"12345\0\0\x006\0\0\0");
    }
}
