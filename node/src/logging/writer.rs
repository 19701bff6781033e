//! Lines to a stream that may not be read: written by a thread of their own, dropped and counted when it falls behind.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes that wait to be written. A pipe holds 64 KiB more.
const QUEUE_MAX: usize = 1 << 20;

/// Writes lines in the background, in order. A stream that blocks never blocks a caller: once 1 MiB waits,
/// further lines are dropped, and in their place a line says how many. Clones write to the same stream.
#[derive(Clone)]
pub struct Writer(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Makes the line that reports a number of dropped lines.
    report: fn(u64) -> String,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<String>,
    bytes: usize,
    dropped: u64,
    writing: bool,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    /// Starts the thread. It runs until the process ends. `report` makes the line that reports a number of dropped lines.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(mut stream: impl Write + Send + 'static, report: fn(u64) -> String) -> io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new(), report });
        let writer = Self(Arc::clone(&shared));
        std::thread::Builder::new().name("writer".into()).spawn(move || {
            loop {
                let line = shared.next();
                // A closed or full stream: there is no place to report it. Later lines may find room again.
                let _ = stream.write_all(line.as_bytes()).and_then(|()| stream.flush());
            }
        })?;
        Ok(writer)
    }

    /// Queues a line, or drops it. Never waits for the stream.
    pub fn line(&self, text: &str) {
        let mut queue = self.0.lock();
        if queue.bytes + text.len() >= QUEUE_MAX {
            queue.dropped += 1;
        } else {
            queue.report(self.0.report);
            queue.push(text);
        }
        self.0.changed.notify_all();
    }

    /// Waits until everything is written, for at most `limit`.
    pub fn flush(&self, limit: Duration) {
        let queue = self.0.lock();
        let busy = |queue: &mut Queue| queue.writing || queue.dropped > 0 || !queue.lines.is_empty();
        // Whether it was in time: the caller ends the process in both cases.
        drop(self.0.changed.wait_timeout_while(queue, limit, busy));
    }
}

impl Queue {
    fn push(&mut self, text: &str) {
        self.bytes += text.len() + 1;
        self.lines.push_back(format!("{text}\n"));
    }

    /// Queues the report on dropped lines, if there are any.
    fn report(&mut self, report: fn(u64) -> String) -> bool {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            self.push(&report(dropped));
        }
        dropped > 0
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next line to write.
    fn next(&self) -> String {
        let mut queue = self.lock();
        queue.writing = false;
        self.changed.notify_all();
        loop {
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.writing = true;
                return line;
            }
            if queue.report(self.report) {
                continue;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Read as _};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn report(count: u64) -> String {
        format!("{count} lines dropped")
    }

    #[test]
    fn lines_are_written_in_order_before_a_flush_returns() {
        let (mut reader, stream) = io::pipe().unwrap();
        let writer = Writer::start(stream, report).unwrap();
        writer.line("one");
        writer.line("two");
        writer.flush(SOON);
        let mut text = [0; 8];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"one\ntwo\n");
    }

    #[test]
    fn a_stream_that_is_not_read_blocks_no_caller() {
        let (reader, stream) = io::pipe().unwrap();
        let writer = Writer::start(stream, report).unwrap();
        let line = "x".repeat(1000);
        for _ in 0..5000 {
            writer.line(&line);
        }
        writer.flush(Duration::from_millis(10));
        assert!(writer.0.lock().bytes <= QUEUE_MAX);
        // Read at last: the lines that had room, then the number of those that had none, then newer ones.
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        let kept = lines.by_ref().take_while(|text| *text == line).count();
        assert!((1000..4000).contains(&kept), "{kept}");
        writer.line("newer");
        assert!(lines.any(|text| text == "newer"));
    }

    #[test]
    fn the_report_counts_every_dropped_line() {
        let (reader, stream) = io::pipe().unwrap();
        let writer = Writer::start(stream, report).unwrap();
        let line = "x".repeat(1000);
        for _ in 0..5000 {
            writer.line(&line);
        }
        let (mut kept, mut dropped) = (0, 0);
        // More than one report, if the thread made room between two lines.
        for text in BufReader::new(reader).lines().map(Result::unwrap) {
            match text.strip_suffix(" lines dropped") {
                Some(count) => dropped += count.parse::<u64>().unwrap(),
                None => kept += 1,
            }
            if kept + dropped >= 5000 {
                break;
            }
        }
        assert!(dropped > 0);
        assert_eq!(kept + dropped, 5000);
    }

    #[test]
    fn a_closed_stream_is_no_error() {
        let (reader, stream) = io::pipe().unwrap();
        drop(reader);
        let writer = Writer::start(stream, report).unwrap();
        writer.line("one");
        writer.flush(SOON);
        assert!(writer.0.lock().lines.is_empty());
    }
}
