use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;

use super::{refuses, run, script, succeeds, text};

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
const SECTOR: u64 = 512;
/// No whole number of MiB, so that every format needs a longer disk.
const DISK: u64 = 6 * MIB + 34 * SECTOR;
const PARTITIONS: &str = "label: gpt
label-id: 5b8c4f6e-0f7d-4b62-9d56-3f6c2b1d7a90
start=2048, size=4096, type=U, uuid=11111111-2222-3333-4444-555555555555, name=esp
start=6144, size=6000, type=L, uuid=66666666-7777-8888-9999-aaaaaaaaaaaa, name=root
";

/// A disk with two partitions and content that no compression removes; not sparse.
fn disk(directory: &Path) -> PathBuf {
    let path = directory.join("podvm.raw");
    let mut state = 88_172_645_463_325_252_u64;
    let bytes = (0..DISK / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    fs::write(&path, bytes.collect::<Vec<u8>>()).unwrap();
    // A hole in one of them.
    File::options().write(true).open(&path).unwrap().write_all_at(&vec![0; MIB as usize], 2 * MIB).unwrap();
    let mut sfdisk = std::process::Command::new("/usr/sbin/sfdisk");
    let sfdisk =
        sfdisk.args(["--quiet", "--wipe", "always", text(&path)]).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut sfdisk = sfdisk.spawn().unwrap();
    sfdisk.stdin.take().unwrap().write_all(PARTITIONS.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    path
}

fn partitions(disk: &Path) -> Vec<String> {
    let dump = succeeds("sfdisk", &["--dump", text(disk)]);
    dump.lines().filter_map(|line| Some(line.split_once(" : start=")?.1.to_owned())).collect()
}

fn read(file: &Path, offset: u64, length: u64) -> Vec<u8> {
    let mut file = File::open(file).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).unwrap();
    bytes
}

fn size(file: &Path) -> u64 {
    fs::metadata(file).unwrap().len()
}

/// The partitions and their content are those of `original`, and both GPTs are where firmware looks for them.
fn is_the_disk(copy: &Path, original: &Path) {
    assert_eq!(partitions(copy), partitions(original), "{}", copy.display());
    let start = 2048 * SECTOR;
    let length = (6144 + 6000) * SECTOR - start;
    assert!(
        read(copy, start, length) == read(original, start, length),
        "{}: another content",
        copy.display()
    );
    let last = size(copy) - SECTOR;
    assert_eq!(read(copy, last, 8), b"EFI PART", "{}: no backup GPT at the end", copy.display());
    assert_eq!(
        read(copy, SECTOR + 32, 8),
        (last / SECTOR).to_le_bytes(),
        "{}: place of the backup",
        copy.display()
    );
    let said = succeeds("sfdisk", &["--verify", text(copy)]);
    assert!(said.contains("No errors detected"), "{said}");
}

fn digests(listing: &str) -> Vec<(&str, &str)> {
    listing
        .lines()
        .map(|line| line.split_once("  ").unwrap())
        .map(|(sum, file)| (sum, file.rsplit_once('/').unwrap().1))
        .collect()
}

#[test]
fn each_format_holds_the_disk_and_is_the_same_bits_again() {
    let directory = TempDir::new().unwrap();
    let disk = disk(directory.path());
    let out = directory.path().join("export");
    let first = succeeds(script("export"), &[text(&disk)]);
    let names: Vec<&str> = digests(&first).iter().map(|(_, name)| *name).collect();
    assert_eq!(names, ["podvm.tar.gz", "podvm.qcow2", "podvm.raw", "podvm.vhd"]);

    let raw = out.join("podvm.raw");
    assert_eq!(size(&raw), GIB);
    is_the_disk(&raw, &disk);

    let qcow2 = directory.path().join("from-qcow2");
    succeeds(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", text(&out.join("podvm.qcow2")), text(&qcow2)],
    );
    assert_eq!(size(&qcow2), 7 * MIB);
    is_the_disk(&qcow2, &disk);
    assert!(size(&out.join("podvm.qcow2")) < 6 * MIB, "not compressed");

    // A fixed VHD is the disk and then the footer.
    let vhd = out.join("podvm.vhd");
    assert_eq!(size(&vhd), 7 * MIB + SECTOR);
    let footer = read(&vhd, 7 * MIB, SECTOR);
    assert_eq!((&footer[..8], &footer[60..64]), (&b"conectix"[..], &[0, 0, 0, 2][..]));
    assert_eq!(footer[48..56], (7 * MIB).to_be_bytes());
    let sum: u32 = footer
        .iter()
        .enumerate()
        .filter(|(at, _)| !(64..68).contains(at))
        .map(|(_, byte)| u32::from(*byte))
        .sum();
    assert_eq!(footer[64..68], (!sum).to_be_bytes());
    let content = directory.path().join("from-vhd");
    fs::write(&content, read(&vhd, 0, 7 * MIB)).unwrap();
    is_the_disk(&content, &disk);

    let archive = out.join("podvm.tar.gz");
    assert_eq!(succeeds("tar", &["--list", "--file", text(&archive)]), "disk.raw\n");
    succeeds("tar", &["--extract", "--file", text(&archive), "--directory", text(directory.path())]);
    assert_eq!(size(&directory.path().join("disk.raw")), GIB);
    is_the_disk(&directory.path().join("disk.raw"), &disk);

    // Elsewhere, later, from a copy that is sparse in other places.
    let copy = directory.path().join("other").join("podvm.raw");
    fs::create_dir(copy.parent().unwrap()).unwrap();
    succeeds("cp", &["--sparse=always", text(&disk), text(&copy)]);
    let second =
        succeeds(script("export"), &["--output", text(&directory.path().join("second")), text(&copy)]);
    assert_eq!(digests(&first), digests(&second));
}

/// What qemu-img 8 and later print before the lines of older ones: the file below the format, with a size of its own.
const CHILDREN: &str = r#"    "children": [
        {
            "name": "file",
            "info": {
                "children": [
                ],
                "virtual-size": 7340544,
                "filename": "podvm.vhd",
                "format": "file",
                "actual-size": 7344128,
                "format-specific": {
                    "type": "file",
                    "data": {
                    }
                },
                "dirty-flag": false
            }
        }
    ],
"#;

#[test]
fn export_takes_the_size_from_a_newer_qemu_img() {
    let directory = TempDir::new().unwrap();
    let disk = disk(directory.path());
    let bin = directory.path().join("bin");
    fs::create_dir(&bin).unwrap();
    fs::write(bin.join("children"), CHILDREN).unwrap();
    let program = bin.join("qemu-img");
    let newer = "#!/bin/sh
bin=${PATH%%:*}
PATH=${PATH#*:}
[ \"$1\" = info ] || exec qemu-img \"$@\"
qemu-img \"$@\" | sed \"1r $bin/children\"
";
    fs::write(&program, newer).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("PATH={}:{}:/usr/sbin:/sbin", text(&bin), std::env::var("PATH").unwrap());
    let export = script("export");
    let said = succeeds("env", &[&path, text(&export), "--format", "qcow2", "--format", "vhd", text(&disk)]);
    let names: Vec<&str> = digests(&said).iter().map(|(_, name)| *name).collect();
    assert_eq!(names, ["podvm.qcow2", "podvm.vhd"]);
}

#[test]
fn export_refuses_what_it_can_not_convert() {
    let directory = TempDir::new().unwrap();
    let disk = disk(directory.path());
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let whole = fs::read(&disk).unwrap();
    let cut = &whole[..3 * MIB as usize];
    let no_backup = &whole[..DISK as usize - 512];
    let mut no_primary = whole.clone();
    no_primary[512..1024].fill(0);
    let missing = directory.path().join("missing.raw");
    let out = directory.path().join("export");
    for (disk, said) in [
        (missing.as_path(), "missing.raw: no such file"),
        (directory.path(), "no file that can be read here"),
        (&file("empty.raw", b""), "no disk with a GPT"),
        (&file("zeros.raw", &vec![0; 3 * MIB as usize]), "no disk with a GPT"),
        (&file("cut.raw", cut), "no disk with a GPT"),
        (&file("no-backup.raw", no_backup), "one of its two GPTs is broken"),
        (&file("no-primary.raw", &no_primary), "one of its two GPTs is broken"),
    ] {
        let error = refuses(script("export"), &["--output", text(&out), text(disk)]);
        assert!(error.contains(said), "{}: {error}", disk.display());
        assert!(!out.exists(), "{}: something was made", disk.display());
    }
    let not_a_directory = file("file", b"");
    let error = refuses(script("export"), &["--output", text(&not_a_directory), text(&disk)]);
    assert!(error.contains("can't be made"), "{error}");
    let error = refuses(script("export"), &["--format", "vmdk", text(&disk)]);
    assert!(error.contains("--format vmdk: unknown"), "{error}");
    let error = refuses(
        script("export"),
        &["--format", "raw", "--force", "--output", text(directory.path()), text(&disk)],
    );
    assert!(error.contains("is the disk itself"), "{error}");
    assert!(fs::read(&disk).unwrap() == whole, "the disk changed");
}

#[test]
fn export_replaces_results_only_when_asked() {
    let directory = TempDir::new().unwrap();
    let disk = disk(directory.path());
    let out = directory.path().join("export");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("podvm.vhd"), "mine").unwrap();
    let error = refuses(script("export"), &["--format", "vhd", text(&disk)]);
    assert!(error.contains("podvm.vhd: exists already"), "{error}");
    assert_eq!(fs::read(out.join("podvm.vhd")).unwrap(), b"mine");
    succeeds(script("export"), &["--format", "vhd", "--force", text(&disk)]);
    assert_eq!(size(&out.join("podvm.vhd")), 7 * MIB + SECTOR);
}

#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let directory = TempDir::new().unwrap();
    let disk = disk(directory.path());
    let out = directory.path().join("export");
    fs::create_dir(&out).unwrap();
    // Room for the copy of the disk, but not for the VHD too.
    let script = format!(
        "mount -t tmpfs -o size=9m none {out} || exit 3; {export} --format vhd --output {out} {disk}; code=$?; ls -A {out}; exit $code",
        out = text(&out),
        export = text(&script("export")),
        disk = text(&disk)
    );
    let output = run("unshare", &["--map-root-user", "--mount", "sh", "-c", &script]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("could not be written") && said.contains("is there room"), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "left behind");
}
