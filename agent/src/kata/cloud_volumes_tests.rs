use proptest::prelude::*;

use super::*;

fn one(fields: &str) -> String {
    format!(r#"{{"vol-0":{{{fields}}}}}"#)
}

const GOOD: &str = r#""mount_point":"/data","lun":"0""#;

/// The fault of the only volume.
fn fault(fields: &str) -> Fault {
    match parse(one(fields).as_bytes()) {
        Err(InvalidVolumes::Volume { name, fault }) if name == "vol-0" => fault,
        other => panic!("{fields}: {other:?}"),
    }
}

#[test]
fn what_cloud_api_adaptor_writes_is_read() {
    let text = r#"{"vol-0":{"mount_point":"/data","fs_type":"xfs","lun":"0","disk_id":"vol-0abc","fs_group":"1000",
        "encrypt_type":"luks","key_id":"default/key/1"}}"#;
    let volume = Volume {
        name: "vol-0".into(),
        fs_type: "xfs".into(),
        lun: "0".into(),
        disk_id: "vol-0abc".into(),
        fs_group: "1000".into(),
        encrypt_type: "luks".into(),
        key_id: "default/key/1".into(),
    };
    let expected = CloudVolume { volume, mount_point: "/data".into() };
    assert_eq!(expected.path(), Path::new("/run/cloud-volumes/vol-0"));
    assert_eq!(parse(text.as_bytes()), Ok(vec![expected]));
}

#[test]
fn an_annotation_may_have_no_volumes() {
    for text in ["", "{}", " { } "] {
        assert_eq!(parse(text.as_bytes()), Ok(vec![]), "{text}");
    }
}

#[test]
fn what_may_be_absent_has_a_default() {
    let volumes = parse(one(GOOD).as_bytes()).unwrap();
    let expected =
        Volume { name: "vol-0".into(), fs_type: "ext4".into(), lun: "0".into(), ..Volume::default() };
    assert_eq!(volumes[0].volume, expected);
    // A field of a later version.
    assert_eq!(parse(one(&format!("{GOOD},\"later\":[1,{{}}]")).as_bytes()), Ok(volumes));
}

#[test]
fn volumes_are_in_the_order_of_their_names() {
    let names = ["vol-2", "vol-10", "vol-1", "a"];
    let all: Vec<_> =
        names.iter().map(|name| format!(r#""{name}":{{"mount_point":"/{name}","lun":"0"}}"#)).collect();
    let volumes = parse(format!("{{{}}}", all.join(",")).as_bytes()).unwrap();
    let found: Vec<_> = volumes.iter().map(|volume| &*volume.volume.name).collect();
    assert_eq!(found, ["a", "vol-1", "vol-10", "vol-2"], "as bytes, like upstream");
}

#[test]
fn each_fault_of_a_volume_has_its_name() {
    for (fields, expected) in [
        (r#""lun":"0""#, Fault::MountPoint),
        (r#""mount_point":"","lun":"0""#, Fault::MountPoint),
        (r#""mount_point":"data","lun":"0""#, Fault::MountPoint),
        (r#""mount_point":"/a/../b","lun":"0""#, Fault::MountPoint),
        (r#""mount_point":"/a\nb","lun":"0""#, Fault::MountPoint),
        (r#""mount_point":"/data""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"-1""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"+1""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"4294967296""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"0/../1""#, Fault::Lun),
        (r#""mount_point":"/data","lun":"0","fs_type":"btrfs""#, Fault::FsType),
        (r#""mount_point":"/data","lun":"0","fs_type":"EXT4""#, Fault::FsType),
        (r#""mount_point":"/data","lun":"0","fs_group":"users""#, Fault::FsGroup),
        (r#""mount_point":"/data","lun":"0","encrypt_type":"plain""#, Fault::EncryptType),
        (r#""mount_point":"/data","lun":"0","encrypt_type":"luks2""#, Fault::NoKey),
        (r#""mount_point":"/data","lun":"0","disk_id":"a\u0000b""#, Fault::Id),
        (r#""mount_point":"/data","lun":"0","key_id":"a\nb""#, Fault::Id),
    ] {
        assert_eq!(fault(fields), expected, "{fields}");
    }
    let long = "x".repeat(VALUE_MAX + 1);
    assert_eq!(fault(&format!(r#"{GOOD},"disk_id":"{long}""#)), Fault::Id);
    assert_eq!(fault(&format!(r#""mount_point":"/{long}","lun":"0""#)), Fault::MountPoint);
}

#[test]
fn a_name_that_is_a_path_is_refused() {
    let long = "n".repeat(NAME_MAX + 1);
    for name in ["", ".", "..", "../etc", "a/b", "/", "a\\u0000", ".hidden", "-o", "ä", "a b", "a,b", &long]
    {
        let text = format!(r#"{{"{name}":{{{GOOD}}}}}"#);
        let found = parse(text.as_bytes());
        assert!(matches!(found, Err(InvalidVolumes::Volume { fault: Fault::Name, .. })), "{name}: {found:?}");
    }
    let longest = "n".repeat(NAME_MAX);
    assert_eq!(parse(format!(r#"{{"{longest}":{{{GOOD}}}}}"#).as_bytes()).unwrap().len(), 1);
}

#[test]
fn what_two_decoders_read_differently_is_refused() {
    let twice = format!(r#"{{"a":{{{GOOD}}},"b":{{"mount_point":"/b","lun":"1"}},"a":{{{GOOD}}}}}"#);
    let expected = InvalidVolumes::Volume { name: "a".into(), fault: Fault::Repeated };
    assert_eq!(parse(twice.as_bytes()), Err(expected));
    let field = parse(one(&format!(r#"{GOOD},"lun":"1""#)).as_bytes());
    assert!(field.unwrap_err().to_string().contains("a field twice"));
    let text = format!(r#"{{"a":{{{GOOD}}},"b":{{"mount_point":"//data/.","lun":"1"}}}}"#);
    let expected = InvalidVolumes::Volume { name: "b".into(), fault: Fault::SameMountPoint };
    assert_eq!(parse(text.as_bytes()), Err(expected));
}

#[test]
fn what_is_no_object_of_volumes_is_refused() {
    let deep = format!(r#"{{"vol-0":{{{GOOD},"later":{}"#, "[".repeat(20_000));
    for text in [
        "{",
        "[]",
        "null",
        "0",
        "\"\"",
        "{}}",
        "nonsense",
        "\u{0}",
        r#"{"a":[]}"#,
        r#"{"a":null}"#,
        r#"{"a":["/data","ext4","0"]}"#,
        r#"[["a",{"mount_point":"/data","lun":"0"}]]"#,
        r#"{"a":{"lun":0}}"#,
        r#"{"a":{"mount_point":null}}"#,
        r#"{"a"}"#,
        &deep,
    ] {
        let found = parse(text.as_bytes());
        assert!(
            matches!(found, Err(InvalidVolumes::Json { .. })),
            "{}: {found:?}",
            &text[..text.len().min(40)]
        );
    }
    assert!(matches!(parse(b"{\"\xff\":{}}"), Err(InvalidVolumes::Json { .. })), "no UTF-8");
}

#[test]
fn an_annotation_is_bounded() {
    let all = |number: usize| {
        let one = |at| format!(r#""v{at}":{{"mount_point":"/{at}","lun":"{at}"}}"#);
        format!("{{{}}}", (0..number).map(one).collect::<Vec<_>>().join(","))
    };
    assert_eq!(parse(all(VOLUMES_MAX).as_bytes()).unwrap().len(), VOLUMES_MAX);
    assert_eq!(parse(all(VOLUMES_MAX + 1).as_bytes()), Err(InvalidVolumes::TooMany));
    assert_eq!(parse(all(500).as_bytes()), Err(InvalidVolumes::TooMany));
    let long = " ".repeat(1 << 20);
    assert_eq!(parse(long.as_bytes()), Err(InvalidVolumes::TooLong(1 << 20)));
}

#[test]
fn a_fault_is_one_short_line() {
    let text = format!(r#"{{"{}\n\u001b":{{}}}}"#, "\\n".repeat(5000));
    for text in [text, one(&format!(r#""lun":{}"#, "[".repeat(9999))), "x".repeat(TEXT_MAX)] {
        let message = parse(text.as_bytes()).unwrap_err().to_string();
        assert!(message.len() < 300 && !message.chars().any(char::is_control), "{message}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in r#"(\{|\}|"|:|,|a|vol-0|mount_point|lun|/|0|\\u0000){0,30}"#) {
        for volume in parse(text.as_bytes()).unwrap_or_default() {
            prop_assert!(volume.path().parent() == Some(Path::new(MOUNT_BASE)));
        }
    }
}
