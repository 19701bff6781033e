//! The queue of the log: lines wait here while the output takes none. It is bounded; lines beyond it are counted.

use std::collections::VecDeque;

use log::Level;

use super::log_output::{Sink, would_block};

/// Bytes of text that may wait.
const QUEUE_MAX: usize = 64 * 1024;

/// Lines that go to an output.
#[derive(Debug)]
pub(super) struct LogQueue {
    sink: Sink,
    lines: VecDeque<(Level, String)>,
    bytes: usize,
    /// Lines that were dropped after those in the queue.
    lost: u64,
}

impl LogQueue {
    /// An empty queue.
    pub(super) fn new(sink: Sink) -> Self {
        Self { sink, lines: VecDeque::new(), bytes: 0, lost: 0 }
    }

    /// Writes a line, behind those that wait. If there is no room the line is lost. Returns whether nothing waits.
    pub(super) fn push(&mut self, level: Level, text: String) -> bool {
        // Once a line was lost, later ones are too until that could be said: the lines that are there stay in order.
        if !self.drain() && (self.lost > 0 || self.bytes + text.len() > QUEUE_MAX) {
            self.lost += 1;
            return false;
        }
        self.bytes += text.len();
        self.lines.push_back((level, text));
        self.drain()
    }

    /// Writes what waits, as far as the output takes it. Returns whether nothing waits any more.
    pub(super) fn drain(&mut self) -> bool {
        while let Some((level, text)) = self.lines.front() {
            // An error other than WouldBlock can't be logged: the log itself has failed.
            if self.sink.write(*level, text).is_err_and(|error| would_block(&error)) {
                return false;
            }
            self.bytes -= text.len();
            self.lines.pop_front();
        }
        if self.lost > 0 {
            let line = format!("log: {} messages were lost: nothing read the log in time", self.lost);
            if self.sink.write(Level::Warn, &line).is_err_and(|error| would_block(&error)) {
                return false;
            }
            self.lost = 0;
        }
        self.sink.flush()
    }
}

#[cfg(test)]
#[path = "log_queue_tests.rs"]
mod tests;
