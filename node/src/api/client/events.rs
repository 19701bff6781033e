//! Server-sent events, as they are read (WHATWG HTML, 9.2). Only the fields that the API sends are known.

use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::super::types::{Event, Lost};
use super::{ClientError, Connection, lost, parse};

/// The longest event, in bytes.
const EVENT_MAX: usize = 256 * 1024;

/// An item of a stream of events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamItem {
    /// An event.
    Event(Event),
    /// Events were lost.
    Lost(Lost),
}

/// Reads events. Dropping it closes the connection.
#[derive(Debug)]
pub struct EventReader {
    body: Incoming,
    _connection: Connection,
    buffer: Vec<u8>,
    last_id: Option<String>,
}

impl EventReader {
    pub(super) fn new(body: Incoming, connection: Connection) -> Self {
        Self { body, _connection: connection, buffer: Vec::new(), last_id: None }
    }

    /// Id of the last event that was read, from which another reader can go on. `None` before the first piece.
    pub fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// The next item; `None`: the service has ended the stream.
    ///
    /// # Errors
    /// The connection was lost, or the stream is none of the API.
    ///
    /// # Cancellation
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<StreamItem>, ClientError> {
        loop {
            while let Some(block) = take_block(&mut self.buffer) {
                let block = Block::read(&block);
                if let Some(id) = block.id {
                    self.last_id = Some(id.to_owned());
                }
                match block.event {
                    Some("pod") => return parse(block.data.as_bytes()).map(StreamItem::Event).map(Some),
                    Some("lost") => return parse(block.data.as_bytes()).map(StreamItem::Lost).map(Some),
                    // A comment, or an event of a later version.
                    _ => {}
                }
            }
            if self.buffer.len() > EVENT_MAX {
                return Err(ClientError::Foreign(format!("an event of more than {EVENT_MAX} bytes")));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(|error| lost(&error))?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// Takes what is before the next empty line.
fn take_block(buffer: &mut Vec<u8>) -> Option<String> {
    let end = buffer.windows(2).position(|two| two == b"\n\n")?;
    let rest = buffer.split_off(end + 2);
    let block = std::mem::replace(buffer, rest);
    Some(String::from_utf8_lossy(&block).into_owned())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Block<'a> {
    id: Option<&'a str>,
    event: Option<&'a str>,
    data: String,
}

impl<'a> Block<'a> {
    fn read(text: &'a str) -> Self {
        let mut block = Self::default();
        for line in text.lines() {
            let (field, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => block.id = Some(value),
                "event" => block.event = Some(value),
                "data" => block.data.push_str(value),
                _ => {}
            }
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_from_pieces() {
        let mut buffer =
            b": hello\nretry: 1\nid: 1-0\n\nid: 1-1\nevent: pod\ndata: {\"a\":\"b: c\"}\n\nid: 1".to_vec();
        let first = take_block(&mut buffer).unwrap();
        assert_eq!(Block::read(&first), Block { id: Some("1-0"), ..Block::default() });
        let second = take_block(&mut buffer).unwrap();
        let read = Block::read(&second);
        assert_eq!((read.id, read.event, &*read.data), (Some("1-1"), Some("pod"), "{\"a\":\"b: c\"}"));
        assert_eq!(take_block(&mut buffer), None);
        assert_eq!(buffer, b"id: 1");
    }
}
