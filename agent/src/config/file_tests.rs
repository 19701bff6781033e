use std::io::Write;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::timeout;

use super::*;

/// Timeout of a test that hangs.
const HANG: Duration = Duration::from_secs(60);

async fn read(path: &Path) -> Result<DaemonConfig, DaemonConfigError> {
    timeout(HANG, wait_for(path, UserDataMode::All, &Notifier::default())).await.expect("it waits")
}

async fn read_text(text: &[u8]) -> (PathBuf, Result<DaemonConfig, DaemonConfigError>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("apf.json");
    std::fs::write(&path, text).unwrap();
    let result = read(&path).await;
    (path, result)
}

#[tokio::test]
async fn a_directory_in_its_place_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let text = read(directory.path()).await.unwrap_err().to_string();
    assert!(
        text.contains(&directory.path().display().to_string()) && text.contains("make it a file"),
        "{text}"
    );
}

#[tokio::test]
async fn a_broken_daemon_config_is_reported_with_its_place() {
    for (json, parts) in [
        (&b"[]"[..], &["expected an object", "line 1"][..]),
        (b"{\n\"sc\": \"yes\"}", &["key 'sc'", "expected a boolean", "line 2"]),
        (b"{\"sc-inbounds\": [1]}", &["key 'sc-inbounds'", "expected a string", "line 1"]),
        (b"{\"sc-pp-prv\": 7}", &["key 'sc-pp-prv'", "expected a string"]),
        (b"{\"sc\": true, \"sc\": false}", &["key 'sc': given twice"]),
        (b"{} trailing", &["trailing characters at line 1"]),
        (b"\xff\0\0", &["line 1"]),
        (b"\x80", &["line 1"]),
    ] {
        let (path, result) = read_text(json).await;
        let text = result.unwrap_err().to_string();
        for part in parts.iter().copied().chain([path.to_str().unwrap(), "correct the VM's user data"]) {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert_eq!(text.matches(" at line ").count(), 1, "{text}");
    }
    let (_, result) = read_text(&vec![b' '; SIZE_MAX + 1]).await;
    assert!(result.unwrap_err().to_string().contains("longer than 1048576 bytes"));
}

#[tokio::test]
async fn no_error_quotes_a_string_of_the_daemon_config() {
    let file = r#"{"sc-pp-prv": "c2VjcmV0", "sc": true}"#;
    let quoted = serde_json::to_string(file).unwrap();
    for json in [
        quoted.clone(),
        quoted[..quoted.len() - 1].to_owned() + ", expected \"",
        r#"{"sc": "c2VjcmV0"}"#.to_owned(),
        r#"{"sc": "c2VjcmV0\", expected a"}"#.to_owned(),
        r#"{"pod-network": "c2VjcmV0"}"#.to_owned(),
        r#"{"sc-pp-prv": ["c2VjcmV0"]}"#.to_owned(),
        r#"{"sc-pp-prv": {"c2VjcmV0": 1}}"#.to_owned(),
        r#"{"sc-pp-prv": "c2VjcmV0\q"}"#.to_owned(),
        r#"{"sc-pp-prv": "c2VjcmV0", "sc-pp-prv": "c2VjcmV0"}"#.to_owned(),
        r#"{"sc-pp-prv": "c2VjcmV0"} c2VjcmV0"#.to_owned(),
    ] {
        let (_, result) = read_text(json.as_bytes()).await;
        let error = result.unwrap_err();
        let texts = format!("{error} {error:?}");
        assert!(!texts.contains("c2Vjcm") && texts.contains(" at line 1 column "), "{json} gave {texts}");
    }
}

/// Takes each step once the reader waits again.
async fn steps(path: &Path, steps: Vec<Box<dyn FnOnce()>>) -> Result<DaemonConfig, DaemonConfigError> {
    let script = async {
        for step in steps {
            // More polls than the reader needs for an event and another read.
            for _ in 0..100 {
                yield_now().await;
            }
            step();
        }
    };
    tokio::join!(read(path), script).0
}

#[tokio::test]
async fn a_byte_order_mark_is_skipped() {
    let json = r#"{"pod-name":"märk"}"#;
    let units: Vec<u16> = json.encode_utf16().collect();
    for text in [
        [&b"\xef\xbb\xbf"[..], json.as_bytes()].concat(),
        [&b"\xff\xfe"[..], &units.iter().flat_map(|unit| unit.to_le_bytes()).collect::<Vec<_>>()].concat(),
        [&b"\xfe\xff"[..], &units.iter().flat_map(|unit| unit.to_be_bytes()).collect::<Vec<_>>()].concat(),
    ] {
        let config = read_text(&text).await.1.unwrap();
        assert_eq!(config.pod_name.as_deref(), Some("märk"), "{text:?}");
        // Every beginning of it is a file that is still being written.
        for length in 0..text.len() {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("apf.json");
            std::fs::write(&path, &text[..length]).unwrap();
            assert!(
                matches!(look(&path, UserDataMode::All), Ok(Found::Truncated(_))),
                "{length} bytes of {text:?}"
            );
        }
    }
    // One is enough, and only at the beginning.
    for text in [&b"\xef\xbb\xbf\xef\xbb\xbf{}"[..], b"{}\xef\xbb\xbf", b" \xef\xbb\xbf{}"] {
        assert!(read_text(text).await.1.is_err(), "{text:?}");
    }
}

#[tokio::test]
async fn a_second_document_is_refused() {
    for text in ["{} {}", "{\"sc\":true}\n{\"sc\":false}", "{}[]", "{}\0"] {
        let text = read_text(text.as_bytes()).await.1.unwrap_err().to_string();
        assert!(text.contains("trailing characters"), "{text}");
    }
    assert!(read_text(b"\r\n{}\r\n \t").await.1.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_file_that_comes_by_a_mount_is_seen() {
    use nix::mount::{MsFlags, mount, umount};

    let directory = tempfile::tempdir().unwrap();
    let (place, other) = (directory.path().join("place"), directory.path().join("other"));
    std::fs::create_dir(&place).unwrap();
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("apf.json"), r#"{"pod-name":"mounted"}"#).unwrap();
    let over = place.clone();
    let step = move || mount(Some(&other), &over, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let config = steps(&place.join("apf.json"), vec![Box::new(step)]).await;
    umount(&place).unwrap();
    assert_eq!(config.unwrap().pod_name.as_deref(), Some("mounted"));
}

#[tokio::test(start_paused = true)]
async fn a_link_whose_target_comes_late_is_seen() {
    use std::os::unix::fs::symlink;

    // The file, and its directory.
    for (link, target) in [("apf.json", "far/target"), ("place", "far/place")] {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let path = if link == "place" { at("place/apf.json") } else { at("apf.json") };
        symlink(at(target), at(link)).unwrap();
        let (far, file) = (at("far"), if link == "place" { at("far/place/apf.json") } else { at(target) });
        let parent = file.parent().unwrap().to_owned();
        let config = steps(
            &path,
            vec![
                Box::new(move || std::fs::create_dir_all(far.join("other")).unwrap()),
                Box::new(move || std::fs::create_dir_all(parent).unwrap()),
                Box::new(move || std::fs::write(file, r#"{"pod-name":"linked"}"#).unwrap()),
            ],
        );
        assert_eq!(config.await.unwrap().pod_name.as_deref(), Some("linked"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_replaced_grandparent_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let (run, new) = (directory.path().join("run"), directory.path().join("new"));
    std::fs::create_dir_all(run.join("peerpod")).unwrap();
    std::fs::create_dir_all(new.join("peerpod")).unwrap();
    std::fs::write(new.join("peerpod/apf.json"), r#"{"pod-name":"replaced"}"#).unwrap();
    let path = run.join("peerpod/apf.json");
    let old = directory.path().join("old");
    let config = steps(
        &path,
        vec![Box::new(move || {
            std::fs::rename(&run, old).unwrap();
            std::fs::rename(new, run).unwrap();
        })],
    );
    assert_eq!(config.await.unwrap().pod_name.as_deref(), Some("replaced"));
}

#[tokio::test(start_paused = true)]
async fn without_a_watch_the_file_is_looked_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("apf.json");
    let notifier = Notifier::default();
    let wait = Wait::new(&path, &notifier);
    let began = Instant::now();
    wait.changed(None).await;
    assert_eq!(began.elapsed(), POLL);
}

#[tokio::test]
async fn a_file_in_a_missing_directory_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let parent = directory.path().join("run/peerpod");
    let path = parent.join("apf.json");
    let (file, run) = (path.clone(), directory.path().join("run"));
    let config = steps(
        &path,
        vec![
            Box::new(move || std::fs::create_dir(run).unwrap()),
            Box::new(move || std::fs::create_dir(parent).unwrap()),
            Box::new(move || std::fs::write(file, r#"{"pod-name":"late"}"#).unwrap()),
        ],
    );
    assert_eq!(config.await.unwrap().pod_name.as_deref(), Some("late"));
}

#[tokio::test]
async fn a_file_that_is_being_written_is_waited_for_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("apf.json");
    let mut file = std::fs::File::create(&path).unwrap();
    let config = steps(
        &path,
        vec![Box::new(move || {
            file.write_all(b"{\"pod-name\":").unwrap();
            file.write_all(b"\"slow\"}").unwrap();
        })],
    );
    assert_eq!(config.await.unwrap().pod_name.as_deref(), Some("slow"));
}

#[tokio::test]
async fn a_file_that_is_moved_into_place_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let (path, other) = (directory.path().join("apf.json"), directory.path().join("new"));
    std::fs::write(&path, r#"{"pod-name":"#).unwrap();
    let to = path.clone();
    let config = steps(
        &path,
        vec![
            Box::new({
                let other = other.clone();
                move || std::fs::write(other, r#"{"pod-name":"moved"}"#).unwrap()
            }),
            Box::new(move || std::fs::rename(other, to).unwrap()),
        ],
    );
    assert_eq!(config.await.unwrap().pod_name.as_deref(), Some("moved"));
}

#[tokio::test]
async fn a_file_that_turns_out_to_be_broken_ends_the_wait() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("apf.json");
    let file = path.clone();
    let config = steps(&path, vec![Box::new(move || std::fs::write(file, "{\n nonsense").unwrap())]);
    assert!(config.await.unwrap_err().to_string().contains("line 2 column"));
}
