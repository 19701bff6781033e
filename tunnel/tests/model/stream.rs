//! One stream of a session between an adaptor and an agent, over connections that end at any point: the rules of
//! docs/PROTOCOL.md, section 7.1, around the state machine of each end.
//!
//! A connection is two queues in each direction: the channel of the stream, and the control channel. Each keeps its order,
//! and loses any part of its end when the connection is cut. They are separate because different tasks read them. A second
//! lane says positions only, and delivers them whenever it wants: also after the connection of the stream was replaced.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use secure_comms_tunnel::flow::cost;
use secure_comms_tunnel::session::stream::{StreamState, Transmit};

// By path: the fuzz target includes this file, too.
#[path = "steps.rs"]
mod steps;

pub(crate) use steps::drive;

/// Number of an end.
pub(crate) type Who = usize;
pub(crate) const ADAPTOR: Who = 0;
pub(crate) const AGENT: Who = 1;
const BOTH: [Who; 2] = [ADAPTOR, AGENT];

/// What is explored.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) opener: Who,
    /// Lengths of the messages that each end writes before it ends its direction.
    pub(crate) messages: [Vec<usize>; 2],
    /// Credit of each direction, in messages.
    pub(crate) window: u32,
    /// Whether the programs read what arrives at once. Otherwise they do in the end.
    pub(crate) reads_at_once: bool,
    /// How often the connection is cut, at most.
    pub(crate) cuts: u8,
    /// How often an end closes the stream before its end, at most.
    pub(crate) resets: u8,
    /// How often the other end refuses the stream, at most.
    pub(crate) refusals: u8,
    /// How many positions are said over the other lane, at most.
    pub(crate) elsewhere: u8,
}

/// A position, as it is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct At {
    received: u64,
    granted: u32,
}

/// What goes over the channel of the stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Wire {
    New,
    Again(At),
    Resume(At),
    Confirm,
    Refuse,
    /// First message of the end that confirms `Again` or `Resume`.
    Answer(At),
    Data(Bytes),
    Eof,
    Close,
}

/// What goes over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Control {
    /// The adaptor's list; whether the stream is in it.
    Streams(bool),
    Position(At),
}

#[derive(Clone, Debug, Default, Hash)]
struct Connection {
    is_dead: bool,
    /// Whether the end knows that it is.
    has_noticed: [bool; 2],
    /// By the end that receives.
    channel: [VecDeque<Wire>; 2],
    control: [VecDeque<Control>; 2],
    /// Whether the SSH library of an end has sent CLOSE on the channel: by itself as soon as it has received one.
    has_closed: [bool; 2],
    /// Whether it did so before the end took what came before: all that can't be lost any more.
    has_answered: [bool; 2],
}

/// What an end knows about who has agreed to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Agreed {
    /// It has asked for the stream.
    Asked,
    /// It has been asked, and connects to its server.
    Connecting,
    /// Both have.
    Yes,
}

/// How an end and the connection's channel stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Channel {
    None,
    /// We have sent `New`.
    NewSent,
    /// We have sent `Again` or `Resume`.
    AskedToGoOn,
    /// We must answer; whether with a position. The other end said its own.
    ToAnswer(Option<At>),
    Live,
}

/// One end of the stream, as its session knows it.
#[derive(Clone, Debug, Hash)]
struct End {
    state: StreamState,
    agreed: Agreed,
    channel: Channel,
}

/// What a program at one end does and sees.
#[derive(Clone, Debug, Default, Hash)]
struct Program {
    /// Messages that were written, and whether the direction was ended after them.
    wrote: u32,
    has_ended: bool,
    has_closed: bool,
    /// Bytes that have arrived.
    got: usize,
    got_end: bool,
    /// Messages that have arrived, and that were read.
    arrived: u32,
    read: u32,
    /// Messages that it may write in all.
    allowed: u32,
    /// The last position that it said.
    said: At,
    /// The highest position of the other end that was heard.
    heard: u64,
    /// Whether its stream is over: in good order, or not.
    over: Option<bool>,
}

#[derive(Clone)]
pub(crate) struct Stream {
    plan: Arc<Plan>,
    left: Left,
    ends: [Option<End>; 2],
    programs: [Program; 2],
    connection: Option<Connection>,
    elsewhere: [VecDeque<At>; 2],
    has_begun: bool,
    is_disturbed: bool,
}

impl std::hash::Hash for Stream {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        // The plan is the same in all states.
        (&self.left, &self.ends, &self.programs, &self.connection).hash(state);
        (&self.elsewhere, self.has_begun, self.is_disturbed).hash(state);
    }
}

/// What may still happen of what is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Left {
    cuts: u8,
    resets: u8,
    refusals: u8,
    elsewhere: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Open,
    Accept(Who),
    Refuse(Who),
    Write(Who),
    End(Who),
    Read(Who),
    /// Closes the stream in good order.
    Close(Who),
    /// Closes it at any time.
    Reset(Who),
    /// Says its position, on the control channel or on the other lane.
    Say(Who),
    SayElsewhere(Who),
    /// The end takes what came first on its channel, its control channel or the other lane.
    TakeChannel(Who),
    TakeControl(Who),
    TakeElsewhere(Who),
    /// The SSH library of the end has received CLOSE, and answers it before the end takes what came before.
    AnswerClose(Who),
    Cut,
    /// What is on its way to the end is lost.
    LoseChannel(Who),
    LoseControl(Who),
    LoseElsewhere(Who),
    /// The end has taken all that arrived, and knows that the connection has ended.
    Notice(Who),
    Connect,
}

impl Stream {
    pub(crate) fn new(plan: Plan) -> Self {
        let left =
            Left { cuts: plan.cuts, resets: plan.resets, refusals: plan.refusals, elsewhere: plan.elsewhere };
        let program = Program {
            allowed: plan.window,
            said: At { received: 0, granted: plan.window },
            ..Program::default()
        };
        Self {
            plan: Arc::new(plan),
            left,
            ends: [None, None],
            programs: [program.clone(), program],
            connection: Some(Connection::default()),
            elsewhere: Default::default(),
            has_begun: false,
            is_disturbed: false,
        }
    }

    /// Bytes of the first `count` messages of an end.
    fn bytes(&self, who: Who, count: u32) -> usize {
        self.plan.messages[who][..count as usize].iter().sum()
    }

    /// Position of an end, as it says it now.
    fn at(&self, who: Who) -> At {
        let received = self.ends[who].as_ref().map_or(0, |end| end.state.received());
        At { received, granted: self.plan.window + self.programs[who].read }
    }

    fn live(&self) -> Option<&Connection> {
        self.connection.as_ref().filter(|connection| !connection.is_dead)
    }

    fn has_all_written(&self, who: Who) -> bool {
        self.programs[who].wrote as usize == self.plan.messages[who].len()
    }

    /// Puts something on the channel to the other end. On a connection that has ended it is lost.
    fn put(&mut self, from: Who, wire: Wire) {
        if let Some(connection) = &mut self.connection
            && !connection.is_dead
            && !connection.has_closed[from]
        {
            if wire == Wire::Close {
                connection.has_closed[from] = true;
            }
            connection.channel[1 - from].push_back(wire);
        }
    }

    /// Passes to the channel all that the machine has for it.
    fn pump(&mut self, who: Who) {
        while let Some(end) = &mut self.ends[who]
            && end.channel == Channel::Live
            && let Some(next) = end.state.next_transmit()
        {
            let wire = match next {
                Transmit::Data(data) => Wire::Data(data),
                Transmit::Eof => Wire::Eof,
                Transmit::Close => Wire::Close,
            };
            self.put(who, wire);
        }
    }

    /// The session of an end forgets the stream.
    fn forget(&mut self, who: Who) -> Result<(), String> {
        let program = &mut self.programs[who];
        let in_order = program.got_end && program.has_ended;
        program.over = Some(in_order);
        if let Some(mut end) = self.ends[who].take() {
            end.state.on_close();
            end.state.close();
            expect(end.state.is_over() && end.state.kept_cost() == 0, "it is over, and keeps something")?;
        }
        expect(in_order || self.is_disturbed, "a stream ended before its end, and no end has reset it")
    }

    fn accept(&mut self, who: Who) -> Result<(), String> {
        let at = self.at(who);
        let Some(end) = &mut self.ends[who] else { return Ok(()) };
        end.agreed = Agreed::Yes;
        let Channel::ToAnswer(theirs) = end.channel else { return Ok(()) };
        self.put(who, Wire::Confirm);
        if theirs.is_some() {
            self.put(who, Wire::Answer(at));
        }
        self.go_on(who, theirs.unwrap_or(At { received: 0, granted: self.plan.window }))
    }

    /// The channel carries the stream from here on.
    fn go_on(&mut self, who: Who, theirs: At) -> Result<(), String> {
        self.hear(who, theirs, true)?;
        if let Some(end) = &mut self.ends[who] {
            end.agreed = Agreed::Yes;
            end.channel = Channel::Live;
        }
        self.pump(who);
        Ok(())
    }

    /// The position of the other end is heard.
    fn hear(&mut self, who: Who, At { received, granted }: At, attaches: bool) -> Result<(), String> {
        let Some(end) = &mut self.ends[who] else { return Ok(()) };
        let heard = if attaches { end.state.attach(received) } else { end.state.acknowledge(received) };
        heard.map_err(|lie| format!("an honest end is said to lie: {lie}"))?;
        let program = &mut self.programs[who];
        program.heard = program.heard.max(received);
        program.allowed = program.allowed.max(granted);
        Ok(())
    }

    fn connect(&mut self) {
        self.connection = Some(Connection::default());
        let at = self.at(ADAPTOR);
        let end = self.ends[ADAPTOR].as_mut().filter(|end| end.agreed != Agreed::Connecting);
        let opening = end.map(|end| {
            end.channel = Channel::AskedToGoOn;
            if end.agreed == Agreed::Asked { Wire::Again(at) } else { Wire::Resume(at) }
        });
        if let Some(connection) = &mut self.connection {
            connection.control[AGENT].push_back(Control::Streams(opening.is_some()));
        }
        if let Some(opening) = opening {
            self.put(ADAPTOR, opening);
        }
    }

    fn take_control(&mut self, who: Who, control: Control) -> Result<(), String> {
        match control {
            Control::Position(at) => self.hear(who, at, false),
            Control::Streams(true) => Ok(()),
            Control::Streams(false) => {
                let at = self.at(who);
                match &mut self.ends[who] {
                    Some(end) if end.channel == Channel::None && end.agreed == Agreed::Asked => {
                        end.channel = Channel::AskedToGoOn;
                        self.put(who, Wire::Again(at));
                        Ok(())
                    }
                    Some(end) if end.channel == Channel::None => self.forget(who),
                    _ => Ok(()),
                }
            }
        }
    }

    fn take_channel(&mut self, who: Who, wire: Wire) -> Result<(), String> {
        match wire {
            Wire::New => self.on_open(who, None),
            Wire::Again(at) => self.on_open(who, Some(at)),
            Wire::Resume(at) => match &mut self.ends[who] {
                Some(end) => {
                    end.channel = Channel::ToAnswer(Some(at));
                    self.accept(who)
                }
                None => {
                    self.put(who, Wire::Refuse);
                    Ok(())
                }
            },
            Wire::Confirm => match self.ends[who].as_ref().map(|end| end.channel) {
                Some(Channel::NewSent) => self.go_on(who, At { received: 0, granted: self.plan.window }),
                _ => Ok(()),
            },
            Wire::Answer(at) => self.go_on(who, at),
            Wire::Refuse => self.forget(who),
            Wire::Data(data) => self.on_data(who, &data),
            Wire::Eof => {
                let Some(end) = &mut self.ends[who] else { return Ok(()) };
                end.state.on_eof().map_err(|lie| lie.to_string())?;
                let theirs = &self.programs[1 - who];
                expect(theirs.has_ended, "an end of file that was not sent")?;
                let sent = self.bytes(1 - who, theirs.wrote);
                let program = &mut self.programs[who];
                program.got_end = true;
                expect(program.got == sent, "an end of file before all bytes")
            }
            Wire::Close => {
                self.put(who, Wire::Close);
                self.forget(who)
            }
        }
    }

    fn on_open(&mut self, who: Who, theirs: Option<At>) -> Result<(), String> {
        match &mut self.ends[who] {
            None => {
                let channel = Channel::ToAnswer(theirs);
                self.ends[who] =
                    Some(End { state: StreamState::default(), agreed: Agreed::Connecting, channel });
                Ok(())
            }
            Some(end) => {
                expect(theirs.is_some(), "a stream is opened twice")?;
                end.channel = Channel::ToAnswer(theirs);
                if end.agreed == Agreed::Yes { self.accept(who) } else { Ok(()) }
            }
        }
    }

    fn on_data(&mut self, who: Who, data: &Bytes) -> Result<(), String> {
        let Some(end) = &mut self.ends[who] else { return Ok(()) };
        end.state.on_data(data.len()).map_err(|lie| lie.to_string())?;
        let sent = self.bytes(1 - who, self.programs[1 - who].wrote);
        let program = &mut self.programs[who];
        expect(*data == content(1 - who, program.got, data.len()), "other bytes than were written")?;
        program.got += data.len();
        program.arrived += 1;
        if self.plan.reads_at_once && !program.has_closed {
            program.read += 1;
        }
        expect(program.got <= sent, "more bytes than were written")?;
        expect(program.arrived <= self.plan.window + program.read, "more than the credit allows")
    }

    /// Properties of every state.
    fn check(&self) -> Result<(), String> {
        for who in BOTH {
            let (program, end) = (&self.programs[who], &self.ends[who]);
            let theirs = &self.programs[1 - who];
            expect(program.allowed <= self.plan.window + theirs.read, "more credit than was granted")?;
            let Some(end) = end else { continue };
            expect(end.state.received() == (program.got + usize::from(program.got_end)) as u64, "received")?;
            let wrote = self.plan.messages[who].iter().take(program.wrote as usize);
            let unacknowledged = wrote.scan(0, |end, len| {
                *end += *len as u64;
                Some(if *end > program.heard { u64::from(cost(*len)) } else { 0 })
            });
            let kept = end.state.kept_cost();
            expect(kept == unacknowledged.sum::<u64>(), "it keeps other messages than the unacknowledged")?;
        }
        Ok(())
    }
}

/// Most bytes that an end writes.
const CONTENT_MAX: usize = 1 << 21;

/// The bytes that an end writes at a position: without a period that could hide a lost or doubled message.
fn content(who: Who, at: usize, len: usize) -> Bytes {
    static ALL: LazyLock<[Bytes; 2]> = LazyLock::new(|| {
        BOTH.map(|who| {
            let byte =
                |at: u64| (at ^ ((who as u64) << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0];
            (0..CONTENT_MAX as u64).map(byte).collect()
        })
    });
    ALL[who].slice(at..at + len)
}

fn expect(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

impl Stream {
    fn take_on_connection(&mut self, step: &Step) -> Result<(), String> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        match *step {
            Step::Cut => {
                self.left.cuts -= 1;
                connection.is_dead = true;
            }
            Step::AnswerClose(who) => {
                connection.has_answered[who] = true;
                self.put(who, Wire::Close);
            }
            Step::LoseChannel(who) => connection.channel[who].clear(),
            Step::LoseControl(who) => connection.control[who].clear(),
            Step::TakeControl(who) => {
                if let Some(control) = connection.control[who].pop_front() {
                    self.take_control(who, control)?;
                }
            }
            Step::TakeChannel(who) => {
                if let Some(wire) = connection.channel[who].pop_front() {
                    self.take_channel(who, wire)?;
                }
            }
            Step::Notice(who) => {
                connection.has_noticed[who] = true;
                if connection.has_noticed == [true; 2] {
                    self.connection = None;
                }
                // What was said may be lost; the position is said again with the next open.
                self.programs[who].said = At::default();
                if let Some(end) = &mut self.ends[who] {
                    end.channel = Channel::None;
                }
            }
            _ => {}
        }
        Ok(())
    }
}
