//! Properties of init's parsers for any disk and kernel command line of a host.

use podvm_init::cmdline::{self, BadCmdline};
use podvm_init::gpt::{BadGpt, Header};
use podvm_init::root_hash::RootHash;
use podvm_init::superblock::{SIZE, Superblock};
use podvm_init::table;

const BLOCK: usize = 512;

/// The first byte selects the parser of the rest.
pub(crate) fn exercise(data: &[u8]) {
    let Some((what, data)) = data.split_first() else { return };
    match what {
        b's' => superblock(data),
        b'g' => drop(gpt(data)),
        b'G' => sealed_gpt(data),
        _ => drop(std::str::from_utf8(data).map(command_line)),
    }
}

fn superblock(data: &[u8]) {
    let mut raw = [0; SIZE];
    raw.iter_mut().zip(data).for_each(|(to, byte)| *to = *byte);
    let Ok(superblock) = Superblock::parse(&raw) else { return };
    let mut written = [0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| written[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"verity\0\0\x01\0\0\0\x01");
    put(32, b"sha256");
    put(64, &superblock.data_block().to_le_bytes());
    put(68, &superblock.hash_block().to_le_bytes());
    put(72, &superblock.data_blocks().to_le_bytes());
    put(80, &u16::try_from(superblock.salt().len()).expect("it has its place").to_le_bytes());
    put(88, superblock.salt());
    assert_eq!(Superblock::parse(&written), Ok(superblock.clone()));
    assert_eq!(superblock.data_bytes() / u64::from(superblock.data_block()), superblock.data_blocks());
    // The tree's lowest level has a hash for each block.
    let hashes = superblock.data_blocks() * 32;
    let tree = superblock.hash_bytes() - u64::from(superblock.hash_block());
    assert!(
        (hashes..hashes * 2 + 4 * u64::from(superblock.hash_block())).contains(&tree),
        "{tree} for {hashes}"
    );
    let hash = RootHash::parse(&"5a".repeat(32)).expect("it is one");
    let table = table::verity(&superblock, &hash, "8:1", "8:2");
    assert_eq!(table.split(' ').count(), 10, "{table}");
    assert!(table.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '));
}

/// The first block is the header, the rest has the entries.
fn gpt(disk: &[u8]) -> Option<Header> {
    let (block, entries) = disk.split_at_checked(BLOCK)?;
    let header = Header::parse(block).ok()?;
    assert!((1..=1 << 20).contains(&header.bytes()) && header.first_block() >= 2);
    if entries.len() < header.bytes() {
        assert_eq!(header.partitions(entries), Err(BadGpt::EntriesChecksum));
    }
    Some(header)
}

/// The same with correct checksums, which the fuzzer would not find.
fn sealed_gpt(disk: &[u8]) {
    let mut disk = disk.to_vec();
    if disk.len() < BLOCK {
        return;
    }
    let number =
        |disk: &[u8], at: usize| u32::from_le_bytes(disk[at..at + 4].try_into().expect("four")) as usize;
    let bytes = number(&disk, 80).saturating_mul(number(&disk, 84));
    if bytes <= 1 << 20 {
        disk.resize(BLOCK + bytes, 0);
    }
    let entries = crc32(&disk[BLOCK..]);
    disk[88..92].copy_from_slice(&entries.to_le_bytes());
    let size = number(&disk, 12).min(BLOCK);
    disk[16..20].fill(0);
    let header = crc32(&disk[..size]);
    disk[16..20].copy_from_slice(&header.to_le_bytes());
    let Some(header) = gpt(&disk) else { return };
    let partitions = header.partitions(&disk[BLOCK..]).expect("its checksum is right");
    let entry = bytes / partitions.len();
    assert!(partitions.len() * entry == bytes && entry >= 128 && entry.is_power_of_two());
    for (partition, entry) in partitions.iter().zip(disk[BLOCK..].chunks(entry)) {
        assert_eq!(partition.is_some(), entry[..16] != [0; 16]);
    }
    // A flipped bit of either is detected.
    let mut other = disk[BLOCK..].to_vec();
    other[bytes / 2] ^= 4;
    assert_eq!(header.partitions(&other), Err(BadGpt::EntriesChecksum));
    let mut other = disk[..BLOCK].to_vec();
    other[size / 2] ^= 4;
    assert!(Header::parse(&other).is_err());
}

fn crc32(bytes: &[u8]) -> u32 {
    let table: [u32; 256] = std::array::from_fn(|at| {
        (0..8).fold(at as u32, |crc, _| if crc & 1 == 1 { 0xedb8_8320 ^ crc >> 1 } else { crc >> 1 })
    });
    !bytes.iter().fold(!0, |crc, byte| table[(crc as u8 ^ byte) as usize] ^ crc >> 8)
}

fn command_line(line: &str) {
    // Blanks within double quotes do not separate arguments.
    let (mut words, mut quoted) = (vec![String::new()], false);
    for c in line.chars() {
        quoted ^= c == '"';
        match words.last_mut() {
            Some(word) if quoted || !c.is_ascii_whitespace() => word.push(c),
            _ => words.push(String::new()),
        }
    }
    let named: Vec<&str> = words.iter().filter_map(|word| word.strip_prefix("roothash=")).collect();
    match (cmdline::root_hash(line), &named[..]) {
        (Ok(hash), [named]) => {
            assert_eq!(hash.to_string(), named.to_ascii_lowercase());
            let halves =
                [hash.data_partition(), hash.hash_partition()].map(|half| half.to_string().replace('-', ""));
            assert_eq!(halves.concat(), hash.to_string());
        }
        (Err(BadCmdline::Malformed(_)), [named]) => {
            assert!(named.len() != 64 || named.bytes().any(|byte| !byte.is_ascii_hexdigit()));
        }
        (Err(BadCmdline::Missing), []) | (Err(BadCmdline::Repeated), [_, _, ..]) => {}
        (found, named) => panic!("{found:?} where {named:?} is named"),
    }
}
