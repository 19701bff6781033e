use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::super::log_output::{Channel, Syslog};
use super::*;

const LINES: u64 = 20_000;

/// Logs many lines that nothing reads, then reads them. Returns what arrives, line by line.
fn flood(queue: &mut LogQueue, mut read: impl FnMut(&mut LogQueue) -> String) -> Vec<String> {
    for n in 0..LINES {
        queue.push(Level::Info, format!("line {n}"));
    }
    let mut lines = Vec::new();
    while !lines.last().is_some_and(|line: &String| line.contains("messages were lost")) {
        assert!((lines.len() as u64) < LINES, "every line arrived");
        lines.push(read(queue));
    }
    lines
}

fn are_in_order_and_counted(lines: &[String], prefix: &str) {
    let (lost, lines) = lines.split_last().unwrap();
    for (n, line) in lines.iter().enumerate() {
        assert_eq!(line, &format!("{prefix}line {n}"));
    }
    let lost: u64 = lost.split_once("log: ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(lost + lines.len() as u64, LINES);
}

fn read_lines(reader: impl io::Read) -> impl FnMut(&mut LogQueue) -> String {
    let mut reader = BufReader::new(reader);
    move |queue| {
        queue.drain();
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

#[test]
fn lines_that_a_pipe_does_not_take_are_counted() {
    let (reader, writer) = io::pipe().unwrap();
    let mut queue = LogQueue::new(Sink::Plain(Channel::over(OwnedFd::from(writer)).unwrap()));
    are_in_order_and_counted(&flood(&mut queue, read_lines(reader)), "info: ");
    assert!(queue.drain() && queue.push(Level::Info, "room again".into()));
}

#[test]
fn lines_that_the_journal_does_not_take_are_counted() {
    let (reader, writer) = UnixStream::pair().unwrap();
    let mut queue = LogQueue::new(Sink::Journal(Channel::over(OwnedFd::from(writer)).unwrap()));
    are_in_order_and_counted(&flood(&mut queue, read_lines(reader)), "<6>");
}

#[test]
fn lines_that_syslog_does_not_take_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let (_reader, writer) = io::pipe().unwrap();
    let stderr = Channel::over(OwnedFd::from(writer)).unwrap();
    let mut queue = LogQueue::new(Sink::Syslog(Syslog::new(&path), stderr));
    let read = |queue: &mut LogQueue| {
        queue.drain();
        let mut buffer = [0; 256];
        let length = daemon.recv(&mut buffer).unwrap();
        let line = std::str::from_utf8(&buffer[..length]).unwrap();
        line.split_once("]: ").unwrap().1.to_owned()
    };
    are_in_order_and_counted(&flood(&mut queue, read), "");
}

#[test]
fn what_waits_is_bounded() {
    let (_reader, writer) = io::pipe().unwrap();
    let mut queue = LogQueue::new(Sink::Plain(Channel::over(OwnedFd::from(writer)).unwrap()));
    for _ in 0..1000 {
        queue.push(Level::Info, "x".repeat(1900));
        assert!(queue.bytes <= QUEUE_MAX);
    }
    assert!(queue.lost > 800 && queue.lines.len() <= QUEUE_MAX / 1900, "{} lost", queue.lost);
}

#[test]
fn a_closed_output_keeps_no_lines() {
    let (reader, writer) = io::pipe().unwrap();
    let mut queue = LogQueue::new(Sink::Plain(Channel::over(OwnedFd::from(writer)).unwrap()));
    drop(reader);
    for _ in 0..100 {
        assert!(queue.push(Level::Info, "unread".into()));
    }
    assert_eq!((queue.bytes, queue.lost), (0, 0));
}
