use std::path::PathBuf;

use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

use secure_comms_protocol::volumes::{Request as VolumesRequest, Volume};

use super::{
    EditError, Method, Mounts, Verdict, create_container, create_sandbox, mounts, recognise, request,
};
use crate::kata::cloud_volumes::{CLOUD_VOLUMES, Fault, InvalidVolumes};
use crate::kata::frame::HEADER;
use crate::kata::messages::{
    self, CreateContainer, CreateSandbox, Linux, LinuxNamespace, Mount, Oci, Request, decode,
};
use crate::kata::protobuf::Malformed;

const PATH: &str = "/run/netns/podns";

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.split_whitespace().flat_map(str::bytes).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn ours() -> LinuxNamespace {
    LinuxNamespace { kind: "network".into(), path: PATH.into(), later: String::new() }
}

/// The expected edit of `before`.
fn edited(mut before: CreateContainer) -> CreateContainer {
    let linux = before.oci.get_or_insert_default().linux.get_or_insert_default();
    linux.namespaces.retain(|namespace| namespace.kind != "network");
    linux.namespaces.push(ours());
    before
}

#[test]
fn golden_bytes_of_a_container_without_a_network_namespace() {
    // container_id "c", an unknown field 15, OCI { Linux { Namespaces { "mount" } } }
    let before = hex("0a0163 7a0178 320b 4209 3207 0a056d6f756e74");
    // The same, and in its Linux Namespaces { "network", "/run/netns/podns" }
    let after = "0a0163 7a0178 3228 4226 3207 0a056d6f756e74 321b 0a076e6574776f726b 12102f72756e2f6e65746e732f706f646e73";
    assert_eq!(create_container(&before, Some(PATH)).unwrap(), hex(after));
}

#[test]
fn golden_bytes_of_a_container_with_two_network_namespaces() {
    // OCI { unknown 14 "x", Linux { "network" "/a", unknown 13: 1, "pid", "network" } }, unknown 15
    let network = "32090a076e6574776f726b";
    let before =
        hex(&format!("3228 720178 4223 320d0a076e6574776f726b12022f61 6801 32050a03706964 {network} 7a0178"));
    let after =
        "322b 720178 4226 6801 32050a03706964 321b 0a076e6574776f726b 12102f72756e2f6e65746e732f706f646e73";
    assert_eq!(create_container(&before, Some(PATH)).unwrap(), hex(&format!("{after} 7a0178")));
}

#[test]
fn a_message_that_two_decoders_read_differently_is_refused() {
    // What we would edit: a container in the pod's network. What the kata agent would take: the last OCI, or the last Linux.
    let linux = "4207 3205 0a03706964";
    let cases = [
        ("OCI", format!("3209 {linux} 7a0178 3209 {linux}")),
        ("OCI", format!("3209 {linux} 3200")),
        ("OCI", "3200 0a0163 3200".into()),
        ("Linux", format!("3212 {linux} {linux}")),
        ("Linux", format!("320e {linux} 720178 4200")),
        ("Linux", "3204 4200 4200".into()),
    ];
    for (name, payload) in cases {
        let payload = hex(&payload);
        let bytes = messages::request(1, "CreateContainer", &payload);
        for namespace in [Some(PATH), None] {
            let fault = request(&bytes[HEADER..], namespace).unwrap_err();
            assert_eq!(fault, Malformed::Repeated(name).into(), "{}", payload.escape_ascii());
        }
        // Of a request that is not edited nothing is read.
        let bytes = messages::request(1, "UpdateContainer", &payload);
        assert_eq!(request(&bytes[HEADER..], Some(PATH)).unwrap().request, &bytes[HEADER..]);
    }
}

#[test]
fn golden_bytes_of_a_sandbox() {
    // hostname "h", dns "1", unknown 9, dns "", sandbox_id "s", dns "22"
    let before = hex("0a0168 120131 4a0101 1200 2a0173 12023232");
    assert_eq!(create_sandbox(&before).unwrap(), hex("0a0168 4a0101 2a0173"));
    let without = hex("0a0168 2a0173");
    assert!(matches!(create_sandbox(&without).unwrap(), std::borrow::Cow::Borrowed(_)), "nothing to do");
}

#[test]
fn golden_bytes_of_a_request_whose_payload_comes_twice() {
    // service, method, payload (not the one that counts), timeout, payload, unknown 12
    let names = "0a11677270632e4167656e7453657276696365 120d43726561746553616e64626f78";
    let before = hex(&format!("{names} 1a03120139 2005 1a06120131 0a0168 620179"));
    let edited = request(&before, Some(PATH)).unwrap();
    assert_eq!(edited.request, hex(&format!("{names} 2005 1a030a0168 620179")));
    assert_eq!(edited.mounts, Mounts::default());
}

#[test]
fn a_request_without_a_payload_gets_one() {
    let before = Request {
        service: "grpc.AgentService".into(),
        method: "CreateContainer".into(),
        timeout_nano: 5,
        ..Request::default()
    };
    let bytes = before.encode_to_vec();
    let after = Request::decode(&*request(&bytes, Some(PATH)).unwrap().request).unwrap();
    let container = CreateContainer::decode(&*after.payload).unwrap();
    assert_eq!(container, edited(CreateContainer::default()));
    assert_eq!(Request { payload: Vec::new(), ..after }, before);
}

#[test]
fn without_a_namespace_a_container_keeps_those_it_has() {
    let linux = Linux { namespaces: vec![ours(), ours()], later: vec![1] };
    let container = CreateContainer {
        oci: Some(Oci { linux: Some(linux), ..Oci::default() }),
        ..CreateContainer::default()
    };
    let bytes = messages::request(1, "CreateContainer", &container.encode_to_vec());
    assert_eq!(request(&bytes[HEADER..], None).unwrap().request, &bytes[HEADER..]);
}

#[test]
fn what_is_malformed_is_told_apart_only_where_it_is_touched() {
    let malformed = [0x32, 0x05, 0x42]; // OCI of five bytes, with one
    for method in ["CreateContainer", "CreateSandbox"] {
        let bytes = messages::request(1, method, &malformed);
        for namespace in [None, Some(PATH)] {
            assert_eq!(request(&bytes[HEADER..], namespace), Err(Malformed::Truncated.into()), "{method}");
        }
    }
    let bytes = messages::request(1, "StartContainer", &malformed);
    assert_eq!(request(&bytes[HEADER..], Some(PATH)).unwrap().request, &bytes[HEADER..]);
    // Within the namespace.
    let deep = hex("3207 4205 3203 0a0461");
    assert_eq!(create_container(&deep, None), Err(Malformed::Truncated));
}

#[test]
fn a_request_is_known_by_its_beginning() {
    let full = messages::request(1, "CreateContainer", &[0x0a; 100]);
    let data = &full[HEADER..];
    // Service and method take 19 and 17 bytes.
    for length in 0..36 {
        assert_eq!(recognise(&data[..length], false), Verdict::More, "{length}");
    }
    assert_eq!(recognise(&data[..36], false), Verdict::Assemble);
    let data = messages::request(1, "WriteStdin", &[0; 100]);
    assert_eq!(recognise(&data[HEADER..HEADER + 31], false), Verdict::Pass);
    let health =
        Request { service: "grpc.Health".into(), method: "CreateSandbox".into(), ..Request::default() };
    assert_eq!(recognise(&health.encode_to_vec(), false), Verdict::Pass);
}

#[test]
fn a_request_in_odd_order_is_assembled_if_its_names_match() {
    let mut odd = Request { payload: vec![0; 100], ..Request::default() }.encode_to_vec();
    odd.truncate(64);
    assert_eq!(recognise(&odd, false), Verdict::More);
    assert_eq!(recognise(&odd, true), Verdict::Assemble);
    let long = Request { service: "x".repeat(100), ..Request::default() }.encode_to_vec();
    assert_eq!(recognise(&long[..64], true), Verdict::Pass);
    assert_eq!(recognise(&[0x0c], false), Verdict::Pass, "no protobuf");
    let (service, method) = ("grpc.AgentService".into(), "CreateSandbox".into());
    let names = Request { service, method, ..Request::default() }.encode_to_vec();
    let swapped = [&names[19..], &names[..19]].concat();
    assert_eq!(recognise(&swapped, false), Verdict::Assemble);
}

#[test]
fn bind_mounts_and_their_volumes_are_found() {
    let mut container =
        CreateContainer::with_mounts(&["/a/", "/b//c", "relative", "/", "/d"], "/x, /a ,/b/c/,/d/e,");
    container.oci.as_mut().unwrap().mounts[4].kind = "tmpfs".into();
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
    let expected = Mounts { sources: paths(&["/a", "/b/c", "/"]), volumes: paths(&["/a", "/b/c"]) };
    assert_eq!(mounts(&container.encode_to_vec()), Ok(expected));
    let split = [container.encode_to_vec(), CreateContainer::with_mounts(&["/z"], "/a").encode_to_vec()];
    assert_eq!(mounts(&split.concat()), Err(Malformed::Repeated("OCI")));
}

/// A mount of the node's directory for a volume, as a runtime requests it.
fn mount(destination: &str, source: &str, kind: &str) -> Mount {
    let options = vec!["rbind".into(), "ro".into()];
    Mount { destination: destination.into(), source: source.into(), kind: kind.into(), options }
}

/// A container with these mounts and the annotation of its cloud volumes, `target_path` too.
fn with_volumes(mounts: Vec<Mount>, cloud_volumes: &str, target_path: &str) -> CreateContainer {
    let annotations = [(CLOUD_VOLUMES, cloud_volumes), (super::VOLUMES, target_path)];
    let annotations = annotations.map(|(key, value)| (key.into(), value.into())).into();
    let oci = Oci { mounts, annotations, later: vec![1, 2, 3], ..Oci::default() };
    CreateContainer { container_id: "c1".into(), oci: Some(oci), later: 7 }
}

const TWO: &str =
    r#"{"vol-1":{"mount_point":"/logs/","lun":"1"},"vol-0":{"mount_point":"/data","lun":"0","disk_id":"d"}}"#;

#[test]
fn the_mounts_of_cloud_volumes_get_new_sources() {
    let before = with_volumes(
        vec![
            mount("/proc", "proc", "proc"),
            mount("/data", "/node/a", "bind"),
            mount("/logs", "/node/b", "tmpfs"),
            mount("/other", "/node/c", "bind"),
            // The volume of /data, once more.
            mount("/data-too", "/node/a", "bind"),
        ],
        TWO,
        ",/node/a,/node/c",
    );
    for namespace in [Some(PATH), None] {
        let bytes = messages::request(1, "CreateContainer", &before.encode_to_vec());
        let edit = request(&bytes[HEADER..], namespace).unwrap();
        let volume = |name: &str, lun: &str, disk_id: &str| Volume {
            name: name.into(),
            fs_type: "ext4".into(),
            lun: lun.into(),
            disk_id: disk_id.into(),
            ..Volume::default()
        };
        let asked = vec![volume("vol-0", "0", "d"), volume("vol-1", "1", "")];
        assert_eq!(edit.volumes, Some(VolumesRequest::Mount(asked)));
        // Neither what was replaced nor what replaces it is made or waited for.
        let left = vec![PathBuf::from("/node/c")];
        assert_eq!(edit.mounts, Mounts { sources: left.clone(), volumes: left });
        let mut expected = if namespace.is_some() { edited(before.clone()) } else { before.clone() };
        let mounts = &mut expected.oci.as_mut().unwrap().mounts;
        mounts[1].source = "/run/cloud-volumes/vol-0".into();
        mounts[2] = mount("/logs", "/run/cloud-volumes/vol-1", "bind");
        mounts[4].source = "/run/cloud-volumes/vol-0".into();
        let after = Request::decode(&edit.request[..]).unwrap();
        assert_eq!(CreateContainer::decode(&after.payload[..]).unwrap(), expected);
    }
}

#[test]
fn golden_bytes_of_a_mount_with_unknown_fields() {
    // OCI { Mounts { destination "/d", source "/s", type "x", unknown 9: 1, options "o", source as a number, source "/t" },
    // Annotations { cloud volumes }, unknown 15 }
    let mount = "0a022f64 12022f73 1a0178 4801 22016f 1005 12022f74";
    let json = br#"{"v":{"mount_point":"/d","lun":"0"}}"#;
    let mut entry = Vec::new();
    crate::kata::protobuf::put(1, CLOUD_VOLUMES.as_bytes(), &mut entry);
    crate::kata::protobuf::put(2, json, &mut entry);
    let payload = |mount: &str| {
        let mut oci = Vec::new();
        crate::kata::protobuf::put(5, &hex(mount), &mut oci);
        crate::kata::protobuf::put(7, &entry, &mut oci);
        oci.extend(hex("7a0178"));
        let mut payload = Vec::new();
        crate::kata::protobuf::put(6, &oci, &mut payload);
        payload
    };
    let bytes = messages::request(1, "CreateContainer", &payload(mount));
    let after = Request::decode(&request(&bytes[HEADER..], None).unwrap().request[..]).unwrap();
    // "/run/cloud-volumes/v", "bind"
    let expected = "0a022f64 4801 22016f 1005 12142f72756e2f636c6f75642d766f6c756d65732f76 1a0462696e64";
    assert_eq!(after.payload, payload(expected));
}

#[test]
fn without_volumes_a_container_stays_as_it_is() {
    for annotation in ["", "{}"] {
        let before = with_volumes(vec![mount("/data", "/node/a", "bind")], annotation, "");
        let bytes = messages::request(1, "CreateContainer", &before.encode_to_vec());
        let edit = request(&bytes[HEADER..], None).unwrap();
        assert_eq!((&edit.request[..], &edit.volumes), (&bytes[HEADER..], &None), "'{annotation}'");
        assert_eq!(edit.mounts.sources, [PathBuf::from("/node/a")]);
    }
}

#[test]
fn a_volume_without_a_mount_is_mounted_all_the_same() {
    for mounts in [vec![], vec![mount("/data/x", "/node/a", "bind"), mount("data", "/node/a", "bind")]] {
        let before = with_volumes(mounts, r#"{"v":{"mount_point":"/data","lun":"0"}}"#, "");
        let bytes = messages::request(1, "CreateContainer", &before.encode_to_vec());
        let edit = request(&bytes[HEADER..], None).unwrap();
        assert_eq!(&edit.request[..], &bytes[HEADER..]);
        assert!(matches!(&edit.volumes, Some(VolumesRequest::Mount(volumes)) if volumes.len() == 1));
    }
}

#[test]
fn a_fault_of_one_volume_refuses_the_container() {
    let json = r#"{"a":{"mount_point":"/a","lun":"0"},"../b":{"mount_point":"/b","lun":"1"}}"#;
    let before = with_volumes(vec![mount("/a", "/node/a", "bind")], json, "");
    let bytes = messages::request(1, "CreateContainer", &before.encode_to_vec());
    let invalid = InvalidVolumes::Volume { name: "../b".into(), fault: Fault::Name };
    assert_eq!(request(&bytes[HEADER..], None), Err(EditError::Volumes(invalid)));
}

#[test]
fn the_end_of_a_sandbox_unmounts() {
    let bytes = messages::request(1, "DestroySandbox", b"any bytes");
    assert_eq!(recognise(&bytes[HEADER..][..36], false), Verdict::Assemble);
    let edit = request(&bytes[HEADER..], Some(PATH)).unwrap();
    assert_eq!(edit.volumes, Some(VolumesRequest::UnmountAll));
    assert_eq!((edit.method, &edit.request[..]), (Some(Method::DestroySandbox), &bytes[HEADER..]));
}

proptest! {
    #[test]
    fn a_container_changes_in_its_network_namespace_only(
        parts in vec(messages::create_container(), 0..4), stream: u32,
    ) {
        // Protobuf merges them. The kata agent does not, so one of them has the OCI.
        let payload: Vec<u8> = parts.iter().flat_map(Message::encode_to_vec).collect();
        let before = CreateContainer::decode(&payload[..]).unwrap();
        let bytes = messages::request(stream, "CreateContainer", &payload);
        if parts.iter().filter(|part| part.oci.is_some()).count() > 1 {
            prop_assert_eq!(request(&bytes[HEADER..], Some(PATH)), Err(Malformed::Repeated("OCI").into()));
            return Ok(());
        }
        let edit = request(&bytes[HEADER..], Some(PATH)).unwrap();
        let after = Request::decode(&edit.request[..]).unwrap();
        prop_assert_eq!(CreateContainer::decode(&after.payload[..]).unwrap(), edited(before));
        let outside = Request { payload: Vec::new(), ..after };
        prop_assert_eq!(outside, Request { payload: Vec::new(), ..decode(&bytes) });
    }

    #[test]
    fn a_sandbox_changes_in_its_dns_only(parts in vec(messages::create_sandbox(), 0..4)) {
        let payload: Vec<u8> = parts.iter().flat_map(Message::encode_to_vec).collect();
        let before = CreateSandbox::decode(&payload[..]).unwrap();
        let after = CreateSandbox::decode(&create_sandbox(&payload).unwrap()[..]).unwrap();
        prop_assert_eq!(after, CreateSandbox { dns: Vec::new(), ..before });
    }

    #[test]
    fn the_sources_are_those_of_another_decoder(container in messages::create_container()) {
        let bind = |oci: &Oci| -> Vec<PathBuf> {
            let sources = oci.mounts.iter().filter(|mount| mount.kind == "bind").map(|mount| &mount.source);
            sources.filter(|source| source.starts_with('/')).map(PathBuf::from).collect()
        };
        let expected = container.oci.as_ref().map(bind).unwrap_or_default();
        prop_assert_eq!(mounts(&container.encode_to_vec()).unwrap().sources, expected);
    }

    #[test]
    fn any_bytes_are_edited_or_refused(data in vec(any::<u8>(), 0..200)) {
        for method in ["CreateContainer", "CreateSandbox"] {
            let bytes = messages::request(1, method, &data);
            drop(request(&bytes[HEADER..], Some(PATH)));
        }
        drop(request(&data, None));
    }
}
