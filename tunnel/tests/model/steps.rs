//! What may happen to the stream of the model, and in which order.

use std::collections::VecDeque;

use secure_comms_tunnel::flow::cost;
use secure_comms_tunnel::session::stream::StreamState;

use super::super::world::World;
use super::{
    Agreed, At, BOTH, Channel, Connection, Control, End, Plan, Step, Stream, Who, Wire, content, expect,
};

/// More steps than a stream needs to finish.
const STEPS_MAX: usize = 10_000;

/// The steps that are possible.
struct Possible(Vec<Step>);

impl Possible {
    fn may(&mut self, is_possible: bool, step: Step) {
        if is_possible {
            self.0.push(step);
        }
    }
}

impl World for Stream {
    type Step = Step;

    fn steps(&self) -> Vec<Step> {
        let mut steps = Possible(Vec::new());
        steps.may(!self.has_begun && self.live().is_some(), Step::Open);
        for who in BOTH {
            if let Some(end) = &self.ends[who] {
                self.steps_of_end(who, end, &mut steps);
            }
            let program = &self.programs[who];
            steps.may(program.read < program.arrived && !program.has_closed, Step::Read(who));
            steps.may(!self.elsewhere[who].is_empty(), Step::TakeElsewhere(who));
            steps.may(!self.elsewhere[who].is_empty() && self.left.cuts > 0, Step::LoseElsewhere(who));
            if let Some(connection) = &self.connection {
                steps_of_connection(who, connection, &mut steps);
            }
        }
        steps.may(self.live().is_some() && self.left.cuts > 0, Step::Cut);
        steps.may(self.connection.is_none(), Step::Connect);
        steps.0
    }

    fn take(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Open | Step::Accept(_) | Step::Refuse(_) => self.take_of_opening(step)?,
            Step::Write(_) | Step::End(_) | Step::Read(_) | Step::Close(_) | Step::Reset(_) => {
                self.take_of_program(step)?;
            }
            Step::Say(who) => {
                let at = self.say(who);
                if let Some(connection) = &mut self.connection {
                    connection.control[1 - who].push_back(Control::Position(at));
                }
            }
            Step::SayElsewhere(who) => {
                self.left.elsewhere -= 1;
                let at = self.say(who);
                self.elsewhere[1 - who].push_back(at);
            }
            Step::TakeElsewhere(who) => {
                if let Some(at) = self.elsewhere[who].pop_front() {
                    self.hear(who, at, false)?;
                }
            }
            Step::LoseElsewhere(who) => {
                self.elsewhere[who].clear();
                // The other end knows that its lane has ended: what it said there is said again.
                self.programs[1 - who].said = At::default();
            }
            Step::Connect => self.connect(),
            _ => self.take_on_connection(step)?,
        }
        for who in BOTH {
            self.pump(who);
        }
        self.check()
    }

    fn is_certain(step: &Step) -> bool {
        !matches!(
            step,
            Step::Cut | Step::Reset(_) | Step::Refuse(_) | Step::SayElsewhere(_) | Step::LoseElsewhere(_)
        )
    }

    fn is_done(&self) -> bool {
        let all =
            |who: Who| self.has_all_written(who) && self.programs[who].read == self.programs[who].arrived;
        self.has_begun
            && self.ends.iter().all(Option::is_none)
            && self.elsewhere.iter().all(VecDeque::is_empty)
            && self.live().is_some_and(|connection| {
                connection.channel.iter().all(VecDeque::is_empty)
                    && connection.control.iter().all(VecDeque::is_empty)
            })
            && (self.is_disturbed || BOTH.into_iter().all(all))
    }
}

impl Stream {
    fn steps_of_end(&self, who: Who, end: &End, steps: &mut Possible) {
        let program = &self.programs[who];
        let agreed = end.agreed == Agreed::Yes;
        let connecting = end.agreed == Agreed::Connecting;
        steps.may(connecting, Step::Accept(who));
        steps.may(connecting && self.left.refusals > 0, Step::Refuse(who));
        let uses = agreed && !program.has_closed;
        let writes = uses && !program.has_ended;
        let has_credit = program.wrote < program.allowed;
        steps.may(writes && has_credit && !self.has_all_written(who), Step::Write(who));
        steps.may(writes && self.has_all_written(who), Step::End(who));
        let all_read = program.got_end && program.read == program.arrived;
        steps.may(uses && program.has_ended && all_read, Step::Close(who));
        // An opener may lose its client before the answer comes.
        let may_reset = !connecting && !program.has_closed;
        steps.may(may_reset && self.left.resets > 0, Step::Reset(who));
        let news = agreed && self.at(who) != program.said;
        // Positions of a stream that wait to be sent become one.
        let waits = |connection: &Connection| {
            connection.control[1 - who].iter().any(|control| matches!(control, Control::Position(_)))
        };
        steps.may(news && self.live().is_some_and(|connection| !waits(connection)), Step::Say(who));
        steps.may(news && self.left.elsewhere > 0, Step::SayElsewhere(who));
    }

    fn say(&mut self, who: Who) -> At {
        let at = self.at(who);
        self.programs[who].said = at;
        at
    }

    fn take_of_opening(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Open => {
                let who = self.plan.opener;
                self.has_begun = true;
                self.ends[who] = Some(End {
                    state: StreamState::default(),
                    agreed: Agreed::Asked,
                    channel: Channel::NewSent,
                });
                self.put(who, Wire::New);
            }
            Step::Accept(who) => self.accept(who)?,
            Step::Refuse(who) => {
                self.left.refusals -= 1;
                self.is_disturbed = true;
                if let Some(End { channel: Channel::ToAnswer(_), .. }) = &self.ends[who] {
                    self.put(who, Wire::Refuse);
                }
                self.ends[who] = None;
            }
            _ => {}
        }
        Ok(())
    }

    fn take_of_program(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Write(who) => {
                let program = &self.programs[who];
                let at = self.bytes(who, program.wrote);
                let len = self.plan.messages[who][program.wrote as usize];
                let data = content(who, at, len);
                self.programs[who].wrote += 1;
                if let Some(end) = &mut self.ends[who] {
                    expect(end.state.push(&data) == cost(len), "a message is not kept")?;
                }
            }
            Step::End(who) => {
                self.programs[who].has_ended = true;
                if let Some(end) = &mut self.ends[who] {
                    end.state.end();
                }
            }
            Step::Read(who) => self.programs[who].read += 1,
            Step::Close(who) | Step::Reset(who) => {
                if let Step::Reset(_) = step {
                    self.left.resets -= 1;
                    self.is_disturbed = true;
                }
                self.programs[who].has_closed = true;
                if let Some(end) = &mut self.ends[who] {
                    end.state.close();
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn steps_of_connection(who: Who, connection: &Connection, steps: &mut Possible) {
    let (channel, control) = (!connection.channel[who].is_empty(), !connection.control[who].is_empty());
    steps.may(channel, Step::TakeChannel(who));
    steps.may(control, Step::TakeControl(who));
    let close_came = connection.channel[who].contains(&Wire::Close) && !connection.is_dead;
    steps.may(close_came && !connection.has_closed[who], Step::AnswerClose(who));
    if connection.is_dead {
        steps.may(channel && !connection.has_answered[who], Step::LoseChannel(who));
        steps.may(control, Step::LoseControl(who));
        steps.may(!channel && !control && !connection.has_noticed[who], Step::Notice(who));
    }
}

/// Takes one of the possible steps for each choice, then those that happen in the end, until all is over.
///
/// # Errors
/// A property does not hold; with the steps so far.
pub(crate) fn drive(plan: Plan, choices: &[u8]) -> Result<(), String> {
    let mut stream = Stream::new(plan);
    let mut taken = Vec::new();
    for choice in choices {
        let steps = stream.steps();
        if let Some(step) = steps.get(usize::from(*choice) % steps.len().max(1)) {
            take(&mut stream, *step, &mut taken)?;
        }
    }
    for count in 0..STEPS_MAX {
        if stream.is_done() {
            return Ok(());
        }
        let mut steps = stream.steps();
        steps.retain(Stream::is_certain);
        match steps.get(count % steps.len().max(1)) {
            Some(step) => take(&mut stream, *step, &mut taken)?,
            None => break,
        }
    }
    Err(format!("can't finish: {taken:?}"))
}

fn take(stream: &mut Stream, step: Step, taken: &mut Vec<Step>) -> Result<(), String> {
    taken.push(step);
    stream.take(&step).map_err(|fault| format!("{fault}: {taken:?}"))
}
