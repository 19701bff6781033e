use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::{TempDir, tempdir};

use secure_comms_protocol::limits::VOLUME_MOUNT;
use tokio::sync::Semaphore;
use tokio::time::{Duration, Instant};

use super::{MountTable, mount_point, mounted, prepare};
use crate::kata::edit::Mounts;
use crate::kata::reply::RequestRefusal;
use crate::kata::sources::MountPrefixes;

/// A tmpfs, unmounted on drop.
struct Volume(PathBuf);

impl Volume {
    fn new(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .expect("this test needs root (CAP_SYS_ADMIN)");
        Self(path)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// Its canonical path, as the mount table has it.
fn directory() -> (TempDir, PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap();
    (directory, path)
}

fn threads() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(1))
}

fn end() -> Instant {
    Instant::now() + VOLUME_MOUNT
}

fn below(directory: &Path) -> MountPrefixes {
    directory.to_str().unwrap().parse().unwrap()
}

fn made(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

#[test]
fn mount_points_are_unescaped() {
    let line = |point: &str| format!("36 35 98:0 / {point} rw,noatime master:1 - ext3 /dev/root rw");
    for (point, path) in [
        ("/", "/"),
        ("/a\\040b\\011c\\012d\\134040", "/a b\tc\nd\\040"),
        ("/a\\", "/a\\"),
        ("/a\\9", "/a\\9"),
    ] {
        assert_eq!(mount_point(line(point).as_bytes()), Some(path.into()));
    }
    assert_eq!(mount_point(b"36 35 98:0 /"), None);
    assert_eq!(mount_point(b""), None);
}

#[tokio::test]
async fn the_kernel_reports_each_change_of_the_mounts() {
    let (_directory, path) = directory();
    let point = made(&path, "a b\\c");
    let table = MountTable::open().unwrap();
    assert!(!table.points().unwrap().contains(&point));
    let volume = Volume::new(&point);
    while !table.points().unwrap().contains(&point) {
        table.changed().await.unwrap();
    }
    drop(volume);
    while table.points().unwrap().contains(&point) {
        table.changed().await.unwrap();
    }
    // The request waits until it is woken.
    let mounting = tokio::task::spawn_blocking(move || Volume::new(point));
    table.changed().await.unwrap();
    drop(mounting.await.unwrap());
}

#[tokio::test]
async fn a_container_waits_for_all_of_its_volumes() {
    let (_directory, path) = directory();
    let (one, two) = (path.join("one"), path.join("deep/two"));
    let other = made(&path, "other");
    // Not the canonical path of the volume.
    let alias = path.join("alias");
    symlink(&two, &alias).unwrap();
    std::fs::create_dir_all(&two).unwrap();
    let sources = vec![one.clone(), alias.clone(), path.join("plain")];
    let waiting = tokio::spawn(prepare(
        Mounts { sources, volumes: vec![one.clone(), alias] },
        below(&path),
        end(),
        threads(),
    ));
    let table = MountTable::open().unwrap();
    while !one.exists() {
        tokio::task::yield_now().await;
    }
    let _other = Volume::new(other);
    let _one = Volume::new(one);
    while !table.points().unwrap().contains(&path.join("one")) {
        table.changed().await.unwrap();
    }
    assert!(!waiting.is_finished());
    let _two = Volume::new(two);
    waiting.await.unwrap().unwrap();
    assert!(path.join("plain").is_dir());
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_does_not_come_is_named() {
    let (_directory, path) = directory();
    let volume = made(&path, "never");
    for (seconds, named) in [(180, "180.0"), (10, "10.0"), (0, "0.0")] {
        let end = Instant::now() + Duration::from_secs(seconds);
        let refusal = mounted(std::slice::from_ref(&volume), end).await.unwrap_err();
        assert!(matches!(&refusal, RequestRefusal::Volume { path, .. } if *path == volume), "{refusal}");
        let text = format!(
            "waiting for the volume {}: nothing was mounted there within {named} s;",
            volume.display()
        );
        assert!(refusal.to_string().starts_with(&text), "{refusal}");
    }
}

#[tokio::test]
async fn sources_that_are_missing_are_made_and_the_others_left_alone() {
    let (_directory, path) = directory();
    let file = path.join("file");
    std::fs::write(&file, "x").unwrap();
    let private = made(&path, "private");
    std::fs::set_permissions(&private, PermissionsExt::from_mode(0o700)).unwrap();
    let missing = path.join("a/b c");
    let sources = vec![file.clone(), private.clone(), missing.clone()];
    prepare(Mounts { sources, volumes: vec![] }, below(&path), end(), threads()).await.unwrap();
    assert_eq!(std::fs::read(file).unwrap(), b"x");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&private), mode(&missing)), (0o700, 0o755));
}

#[tokio::test]
async fn a_source_that_cannot_be_made_is_named() {
    let (_directory, path) = directory();
    std::fs::write(path.join("file"), "x").unwrap();
    let source = path.join("file/below");
    let refusal =
        prepare(Mounts { sources: vec![source.clone()], volumes: vec![] }, below(&path), end(), threads())
            .await
            .unwrap_err();
    let text = format!("making {}, the source of a bind mount: Not a directory", source.display());
    assert!(refusal.to_string().starts_with(&text), "{refusal}");
}

#[tokio::test(start_paused = true)]
async fn a_request_without_a_thread_for_its_mounts_is_refused_in_its_time() {
    let (_directory, path) = directory();
    let (threads, mounts) = (threads(), || Mounts { sources: vec![path.clone()], volumes: vec![] });
    let hangs = threads.clone().acquire_owned().await.unwrap();
    let (start, end) = (Instant::now(), Instant::now() + Duration::from_secs(10));
    let refusal = prepare(mounts(), below(&path), end, threads.clone()).await.unwrap_err();
    assert!(matches!(refusal, RequestRefusal::TooManyThreads(_)), "{refusal}");
    assert_eq!(start.elapsed(), Duration::from_secs(10));
    drop(hangs);
    // The thread that it has now needs real time.
    tokio::time::resume();
    prepare(mounts(), below(&path), Instant::now() + VOLUME_MOUNT, threads).await.unwrap();
}

#[tokio::test]
async fn a_source_elsewhere_is_left_to_the_kata_agent() {
    let (_directory, path) = directory();
    let (inside, outside) = (made(&path, "inside"), path.join("outside/deep"));
    let sources = vec![outside.clone(), inside.join("made")];
    let mounts = Mounts { sources, volumes: vec![] };
    prepare(mounts, below(&inside), end(), threads()).await.unwrap();
    assert!(inside.join("made").is_dir() && !path.join("outside").exists());
}

#[tokio::test]
async fn a_volume_that_may_not_be_made_is_refused_at_once() {
    let (_directory, path) = directory();
    let (inside, outside) = (made(&path, "inside"), path.join("outside"));
    let mounts = Mounts { sources: vec![outside.clone()], volumes: vec![outside.clone()] };
    let refusal = prepare(mounts, below(&inside), end(), threads()).await.unwrap_err();
    let text = format!(
        "waiting for the volume {}: it is missing and not made: it is not below -secure-comms-mount-prefixes;",
        outside.display()
    );
    assert!(refusal.to_string().starts_with(&text), "{refusal}");
    assert!(!outside.exists());
}
