//! Properties of the control channel's reader for any input.

use secure_comms_protocol::Control;
use secure_comms_protocol::control::{ControlError, Lines};
use secure_comms_protocol::limits::CONTROL_LINE_MAX;
use std::iter::repeat_n;

/// Two of these fill a line.
const STRETCH: usize = CONTROL_LINE_MAX / 2;

type Outcome = (Vec<Control>, Result<(), ControlError>);

/// The first byte decides how the rest is split. JSON text has no byte 0xff: here it stands for many blanks, because a
/// fuzzer does not reach the length of the longest lines.
pub(crate) fn exercise(data: &[u8]) {
    let Some((step, rest)) = data.split_first() else { return };
    if rest.iter().filter(|byte| **byte == 0xff).count() > 6 {
        return;
    }
    let stretched = |byte: &u8| if *byte == 0xff { repeat_n(b' ', STRETCH) } else { repeat_n(*byte, 1) };
    let stream: Vec<u8> = rest.iter().flat_map(stretched).collect();
    let expected = model(&stream);
    assert_eq!(fed(&stream, stream.len().max(1)), expected);
    // Small pieces of a long stream would take too long.
    let step = if stream.len() > STRETCH { usize::from(*step) * 256 } else { usize::from(*step) };
    assert_eq!(fed(&stream, step.max(1)), expected, "it matters how the bytes are split: {step}");
    expected.0.iter().for_each(comes_back);
}

fn fed(stream: &[u8], step: usize) -> Outcome {
    let (mut lines, mut messages) = (Lines::default(), Vec::new());
    let result =
        stream.chunks(step).try_for_each(|piece| lines.feed(piece, |message| messages.push(message)));
    (messages, result)
}

/// The same message, written differently.
fn model(stream: &[u8]) -> Outcome {
    let mut messages = Vec::new();
    let mut lines = stream.split(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        if line.len() > CONTROL_LINE_MAX {
            return (messages, Err(ControlError::TooLong));
        }
        // Bytes after the last newline are no line yet.
        if lines.peek().is_none() || line.trim_ascii().is_empty() {
            continue;
        }
        match Control::parse(line.trim_ascii()) {
            Ok(message) => messages.extend(message),
            Err(error) => return (messages, Err(error)),
        }
    }
    (messages, Ok(()))
}

fn comes_back(message: &Control) {
    let mut line = Vec::new();
    message.write_line(&mut line);
    assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1), "one line");
    // Fields that were omitted in the input are written, so a line near the limit may exceed it.
    if line.len() <= CONTROL_LINE_MAX {
        assert_eq!(Control::parse(&line).as_ref(), Ok(&Some(message.clone())));
    }
}
