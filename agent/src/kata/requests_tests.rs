use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use prost::Message;
use secure_comms_protocol::limits::TTRPC_DATA_MAX;

use super::super::budget::Room;
use super::{Held, Out, Requests, Seen};
use crate::kata::edit::{Mounts, request as edit_request};
use crate::kata::frame::{FrameError, HEADER, Header, RESPONSE};
use crate::kata::messages::{CreateContainer, CreateSandbox, Oci, Request, decode, frame, request};
use crate::kata::reply::RequestRefusal;

const PATH: &str = "/run/netns/podns";
/// The type of a data frame.
const DATA: u8 = 3;

fn requests() -> Requests {
    Requests::new(Some(PATH.into()))
}

/// The results for these messages.
fn take(requests: &mut Requests, messages: &[Bytes]) -> Result<Vec<Out>, FrameError> {
    let mut all = Vec::new();
    for message in messages {
        requests.take(message.clone(), &mut |out| all.push(out))?;
    }
    Ok(all)
}

fn held(frame: impl Into<Bytes>) -> Held {
    Held {
        stream: 1,
        frame: frame.into(),
        volumes: None,
        mounts: Mounts::default(),
        deadline: None,
        room: Room::default(),
    }
}

/// The bytes that pass; panics on any other result.
fn passed(outs: Vec<Out>) -> Vec<Bytes> {
    let piece = |out| match out {
        Out::Pass(piece) => piece,
        other => panic!("{other:?}"),
    };
    outs.into_iter().map(piece).collect()
}

fn sandbox(stream: u32) -> Vec<u8> {
    let sandbox =
        CreateSandbox { dns: vec!["10.0.0.1".into()], sandbox_id: "s".into(), ..Default::default() };
    request(stream, "CreateSandbox", &sandbox.encode_to_vec())
}

fn range(bytes: &Bytes) -> Range<usize> {
    let start = bytes.as_ptr() as usize;
    start..start + bytes.len()
}

/// `data`, cut at these offsets.
fn split(stream: &[u8], cuts: &[Index]) -> Vec<Bytes> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    cuts.extend([0, stream.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| Bytes::copy_from_slice(&stream[pair[0]..pair[1]])).collect()
}

fn untouched() -> impl Strategy<Value = Vec<u8>> {
    let method = prop_oneof![Just("WriteStdin"), Just("CreateContainers"), Just("X"), Just("StartContainer")];
    prop_oneof![
        (any::<u32>(), vec(any::<u8>(), 0..200)).prop_map(|(stream, data)| frame(DATA, stream, &data)),
        (any::<u32>(), vec(any::<u8>(), 0..20)).prop_map(|(stream, data)| frame(RESPONSE, stream, &data)),
        (any::<u32>(), method, vec(any::<u8>(), 0..200))
            .prop_map(|(stream, method, data)| request(stream, method, &data)),
    ]
}

/// A frame, and the expected result.
fn any_frame() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let touched = any::<u32>().prop_map(|stream| {
        let before = sandbox(stream);
        let data = edit_request(&before[HEADER..], None).unwrap().request.into_owned();
        (before, frame(1, stream, &data))
    });
    prop_oneof![3 => untouched().prop_map(|frame| (frame.clone(), frame)), 1 => touched]
}

proptest! {
    #[test]
    fn untouched_frames_pass_as_slices_of_what_came(
        frames in vec(untouched(), 0..8), cuts in vec(any::<Index>(), 0..20),
    ) {
        let stream = frames.concat();
        let messages = split(&stream, &cuts);
        let mut requests = requests();
        let pieces = passed(take(&mut requests, &messages).unwrap());
        prop_assert_eq!(pieces.concat(), stream);
        for piece in &pieces {
            let piece = range(piece);
            let within = |message: &Bytes| {
                range(message).start <= piece.start && piece.end <= range(message).end
            };
            prop_assert!(messages.iter().any(within), "a copy");
        }
        prop_assert_eq!(requests.end(), Ok(()));
    }

    #[test]
    fn it_does_not_matter_how_frames_are_split_into_messages(
        frames in vec(any_frame(), 0..8), cuts in vec(any::<Index>(), 0..40),
    ) {
        let (before, after): (Vec<_>, Vec<_>) = frames.into_iter().unzip();
        let pieces = passed(take(&mut requests(), &split(&before.concat(), &cuts)).unwrap());
        prop_assert_eq!(pieces.concat(), after.concat());
        prop_assert!(pieces.iter().all(|piece| !piece.is_empty()));
    }

    #[test]
    fn what_is_released_goes_on_between_frames(
        frames in vec(untouched(), 1..5), cut in any::<Index>(),
    ) {
        let stream = frames.concat();
        let cut = cut.index(stream.len() + 1);
        let mut requests = requests();
        let mut got = passed(take(&mut requests, &[Bytes::copy_from_slice(&stream[..cut])]).unwrap());
        requests.release(held("RELEASED"));
        got.extend(passed(requests.due().into_iter().collect()));
        prop_assert!(requests.due().is_none());
        got.extend(passed(take(&mut requests, &[Bytes::copy_from_slice(&stream[cut..])]).unwrap()));
        prop_assert!(!requests.has_released());
        let mut ends = vec![0];
        for frame in &frames {
            ends.push(ends.last().unwrap() + frame.len());
        }
        let place = ends.into_iter().find(|end| *end >= cut).unwrap();
        prop_assert_eq!(got.concat(), [&stream[..place], b"RELEASED", &stream[place..]].concat());
    }

    #[test]
    fn any_bytes_pass_or_end_the_stream(messages in vec(vec(any::<u8>(), 0..40), 0..10)) {
        let messages: Vec<Bytes> = messages.into_iter().map(Bytes::from).collect();
        drop(take(&mut requests(), &messages));
    }
}

#[test]
fn many_whole_frames_of_one_message_pass_as_one_piece() {
    let stream = Bytes::from([request(1, "WriteStdin", &[7; 100]), frame(DATA, 3, b"x")].concat().repeat(50));
    let pieces = passed(take(&mut requests(), std::slice::from_ref(&stream)).unwrap());
    assert_eq!(pieces.len(), 1);
    assert_eq!(range(&pieces[0]), range(&stream));
}

#[test]
fn an_edited_frame_keeps_its_stream_and_flags() {
    let container = CreateContainer { container_id: "c".into(), ..Default::default() }.encode_to_vec();
    let before = request(0x0102_0305, "CreateContainer", &container);
    let after = passed(take(&mut requests(), &[before.clone().into()]).unwrap()).concat();
    let header = |frame: &[u8]| Header::parse(frame[..HEADER].try_into().unwrap()).unwrap();
    assert_eq!(header(&after), Header { length: after.len() - HEADER, ..header(&before) });
    let (before, after) = (decode(&before), decode(&after));
    let namespaces = CreateContainer::decode(&*after.payload).unwrap().namespaces();
    assert_eq!(namespaces.len(), 1);
    assert_eq!((namespaces[0].kind.as_str(), namespaces[0].path.as_str()), ("network", PATH));
    assert_eq!((after.timeout_nano, after.metadata, after.later), (before.timeout_nano, before.metadata, 3));
}

#[test]
fn frames_around_an_edited_one_keep_their_order() {
    let message = [frame(DATA, 1, b"before"), sandbox(3), frame(DATA, 5, b"after"), sandbox(7)].concat();
    let pieces = passed(take(&mut requests(), &[message.into()]).unwrap());
    let streams: Vec<u8> = pieces.iter().map(|piece| piece[7]).collect();
    assert_eq!(streams, [1, 3, 5, 7]);
}

#[test]
fn a_container_with_bind_mounts_is_held_and_others_pass() {
    let container = CreateContainer::with_mounts(&["/a"], "/a").encode_to_vec();
    let message = [request(9, "CreateContainer", &container), frame(DATA, 11, b"x")].concat();
    let outs = take(&mut requests(), &[message.into()]).unwrap();
    let [Out::Hold(Held { stream: 9, frame, mounts, .. }), Out::Pass(_)] = &outs[..] else {
        panic!("{outs:?}")
    };
    assert_eq!(mounts.volumes, mounts.sources);
    assert_eq!(CreateContainer::decode(&*decode(frame).payload).unwrap().namespaces().len(), 1);
}

#[test]
fn refusals_name_their_stream() {
    let malformed = request(21, "CreateContainer", &[0x32, 9]);
    let outs = take(&mut requests(), &[malformed.into()]).unwrap();
    assert!(
        matches!(&outs[..], [Out::Refuse { stream: 21, refusal: RequestRefusal::Malformed(_) }]),
        "{outs:?}"
    );
    let fits = |later: usize| {
        let oci = Oci { later: vec![0; later], ..Oci::default() };
        let container = CreateContainer { oci: Some(oci), ..CreateContainer::default() };
        request(23, "CreateContainer", &container.encode_to_vec())
    };
    let room = TTRPC_DATA_MAX + HEADER - fits(1 << 21).len() + (1 << 21);
    let full = fits(room);
    assert_eq!(full.len(), TTRPC_DATA_MAX + HEADER);
    let outs = take(&mut requests(), &[full.into()]).unwrap();
    assert!(
        matches!(&outs[..], [Out::Refuse { stream: 23, refusal: RequestRefusal::TooLong(_) }]),
        "{outs:?}"
    );
    let outs = take(&mut requests(), &[fits(room - 31).into()]).unwrap();
    assert_eq!(passed(outs)[0].len(), TTRPC_DATA_MAX + HEADER, "the edit adds 31 bytes");
}

#[test]
fn a_request_in_an_odd_order_is_edited_too() {
    let bytes = sandbox(1);
    // Service and method take 19 and 15 bytes of the data.
    let (names, rest) = bytes[HEADER..].split_at(34);
    let odd = frame(1, 1, &[rest, names].concat());
    let after = passed(take(&mut requests(), &[odd.into()]).unwrap()).concat();
    assert!(CreateSandbox::decode(&*decode(&after).payload).unwrap().dns.is_empty());
}

fn with_timeout(timeout_nano: i64) -> Bytes {
    let container = CreateContainer::with_mounts(&["/a"], "/a").encode_to_vec();
    let before = request(9, "CreateContainer", &container);
    let data = Request { timeout_nano, ..decode(&before) }.encode_to_vec();
    frame(1, 9, &data).into()
}

#[tokio::test(start_paused = true)]
async fn a_held_request_passes_with_what_is_left_of_its_timeout() {
    for (nanos, after, left) in [
        (10_000_000_000, 4, Some(6_000_000_000)),
        (10_000_000_000, 10, None),
        (10_000_000_000, 11, None),
        // No limit, as in ttrpc's servers.
        (0, 200, Some(0)),
        (-1, 200, Some(-1)),
        (i64::MIN, 200, Some(i64::MIN)),
    ] {
        let mut requests = requests();
        let Some(Out::Hold(held)) = take(&mut requests, &[with_timeout(nanos)]).unwrap().pop() else {
            panic!("it is not held")
        };
        let before = held.frame.clone();
        tokio::time::advance(Duration::from_secs(after)).await;
        requests.release(held);
        match (requests.due().unwrap(), left) {
            (Out::Pass(frame), Some(left)) => {
                assert_eq!(decode(&frame), Request { timeout_nano: left, ..decode(&before) });
                let header = Header::parse(frame[..HEADER].try_into().unwrap()).unwrap();
                assert_eq!((header.length, header.stream), (frame.len() - HEADER, 9));
            }
            (Out::Refuse { stream: 9, refusal: RequestRefusal::TimedOut }, None) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_that_ends_within_another_frame_counts_too() {
    let mut requests = requests();
    let Some(Out::Hold(held)) = take(&mut requests, &[with_timeout(5_000_000_000)]).unwrap().pop() else {
        panic!("it is not held")
    };
    let data = frame(DATA, 11, b"data");
    passed(take(&mut requests, &[data[..12].to_vec().into()]).unwrap());
    requests.release(held);
    assert!(requests.due().is_none());
    tokio::time::advance(Duration::from_secs(5)).await;
    let outs = take(&mut requests, &[data[12..].to_vec().into()]).unwrap();
    assert!(
        matches!(&outs[..], [Out::Pass(_), Out::Refuse { stream: 9, refusal: RequestRefusal::TimedOut }]),
        "{outs:?}"
    );
}

#[test]
fn a_frame_that_is_too_long_is_refused_and_its_neighbours_pass() {
    let before = request(1, "WriteStdin", b"a");
    for kind in [1, RESPONSE, DATA] {
        for stream in [0, 2, 3, u32::MAX] {
            let long = frame(kind, stream, &vec![0x0a; TTRPC_DATA_MAX + 1]);
            let all = Bytes::from([&before[..], &long, &sandbox(5), &frame(DATA, 7, b"")].concat());
            for step in [all.len(), 32 * 1024, 1021] {
                let messages: Vec<_> = all.chunks(step).map(Bytes::copy_from_slice).collect();
                let mut requests = requests();
                let outs = take(&mut requests, &messages).unwrap();
                assert_eq!(requests.end(), Ok(()));
                let refused = |out: &Out| {
                    matches!(out, Out::Refuse { stream: refused, refusal: RequestRefusal::FrameTooLong(4_194_305) }
                        if *refused == stream)
                };
                assert_eq!(outs.iter().filter(|out| refused(out)).count(), 1);
                let passed = passed(outs.into_iter().filter(|out| !refused(out)).collect()).concat();
                assert_eq!(passed[..before.len()], before);
                let rest = &passed[before.len()..];
                assert_eq!((rest[7], rest[rest.len() - 3]), (5, 7), "its bytes are dropped");
            }
        }
    }
}

#[test]
fn a_header_that_comes_in_pieces_is_refused_once_it_is_whole() {
    let long = Header { length: u32::MAX as usize, stream: 3, kind: 1, flags: 0 }.to_bytes();
    let mut requests = requests();
    for byte in &long[..9] {
        assert!(take(&mut requests, &[Bytes::copy_from_slice(&[*byte])]).unwrap().is_empty());
    }
    let outs = take(&mut requests, &[Bytes::copy_from_slice(&long[9..])]).unwrap();
    assert!(matches!(&outs[..], [Out::Refuse { stream: 3, .. }]), "{outs:?}");
    assert!(take(&mut requests, &[vec![7; 9000].into()]).unwrap().is_empty());
    assert_eq!(requests.end(), Err(FrameError::Truncated(u32::MAX as usize - 9000)));
}

/// The kata agent answers each of these on its stream, so none may end the connection here.
#[test]
fn odd_frames_pass_for_the_kata_agent_to_judge() {
    let names = "grpc.AgentService";
    for odd in [
        frame(1, 1, b""),
        frame(1, 0, &sandbox(1)[HEADER..HEADER + 34]),
        frame(0, 3, b"x"),
        frame(4, 3, b"x"),
        frame(255, 3, b""),
        frame(RESPONSE, 3, b"x"),
        frame(DATA, 0, b""),
        request(2, "WriteStdin", b""),
        request(0, "StartContainer", b""),
        request(1, "", b""),
        request(1, names, b""),
    ] {
        let all = Bytes::from([&odd[..], &request(5, "WriteStdin", b"")].concat());
        for step in [all.len(), 1] {
            let messages: Vec<_> = all.chunks(step).map(Bytes::copy_from_slice).collect();
            let mut requests = requests();
            assert_eq!(passed(take(&mut requests, &messages).unwrap()).concat(), all, "{odd:?}");
            assert_eq!(requests.end(), Ok(()));
        }
    }
}

#[test]
fn a_request_that_is_cut_is_refused_and_its_neighbours_pass() {
    let next = request(5, "WriteStdin", b"");
    for data in [&b"\xff\xff\xff"[..], &[0x0a, 0x7f], &sandbox(1)[HEADER..HEADER + 40]] {
        let all = Bytes::from([&frame(1, 3, data)[..], &next].concat());
        let outs = take(&mut requests(), &[all]).unwrap();
        let [Out::Refuse { stream: 3, refusal: RequestRefusal::Malformed(_) }, Out::Pass(passed)] = &outs[..]
        else {
            panic!("{outs:?}")
        };
        assert_eq!(*passed, next);
    }
}

#[test]
fn the_pods_connection_is_known_by_its_sandbox() {
    let mut requests = requests();
    take(&mut requests, &[request(1, "StartContainer", b"DestroySandbox").into()]).unwrap();
    assert_eq!(requests.seen(), Seen::default());
    take(&mut requests, &[sandbox(3).into()]).unwrap();
    assert_eq!(requests.seen(), Seen { sandbox: true, destroyed: false });
    for byte in request(5, "DestroySandbox", b"") {
        take(&mut requests, &[vec![byte].into()]).unwrap();
    }
    assert_eq!(requests.seen(), Seen { sandbox: true, destroyed: true });
}

#[test]
fn bytes_that_are_no_ttrpc_and_an_end_within_a_frame_are_errors() {
    let longest = Header { length: TTRPC_DATA_MAX, stream: 1, kind: DATA, flags: 0 };
    let mut requests = requests();
    take(&mut requests, &[Bytes::copy_from_slice(&longest.to_bytes())]).unwrap();
    assert_eq!(requests.end(), Err(FrameError::Truncated(TTRPC_DATA_MAX)));
    let over = Header { length: TTRPC_DATA_MAX + 1, kind: 4, ..longest }.to_bytes();
    let error = take(&mut self::requests(), &[Bytes::copy_from_slice(&over)]).unwrap_err();
    assert_eq!(error, FrameError::TooLong(4_194_305));
    let mut requests = self::requests();
    take(&mut requests, &[Bytes::from_static(&[0, 0, 0])]).unwrap();
    assert_eq!(requests.end(), Err(FrameError::Truncated(7)));
    // Edited ones too.
    let bytes = sandbox(1);
    take(&mut self::requests(), &[Bytes::copy_from_slice(&bytes)]).unwrap();
    let mut requests = self::requests();
    take(&mut requests, &[Bytes::copy_from_slice(&bytes[..bytes.len() - 1])]).unwrap();
    assert_eq!(requests.end(), Err(FrameError::Truncated(1)));
}
