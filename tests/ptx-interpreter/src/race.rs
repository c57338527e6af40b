//! Shared memory, and who accessed it when.
//!
//! Two accesses by different threads of which one is a write must be ordered by a barrier. Each warp has a clock that
//! advances at every synchronization, and knows of each other warp up to which time it is ordered before itself (vector
//! clocks, as race detectors for threads have them). Accesses by threads of one warp are ordered by the warp's own
//! clock: without `bar.warp.sync` or a barrier in between, they are not. Asynchronous copies have a clock of their own.

/// Shared memory is watched in units of two bytes.
const UNIT: usize = 2;

/// A write that has not landed yet, or a read that may still go on: nobody may access what it writes, or write what it
/// reads.
const IN_FLIGHT: u32 = u32::MAX;

/// More than one lane of a warp.
const MANY: u8 = 255;

pub(crate) struct Shared {
    pub(crate) bytes: Vec<u8>,
    agents: usize,
    /// For each unit, of the last write: the agent, the lane, the agent's clock. A clock of 0: never written.
    writes: Vec<(u8, u8, u32)>,
    /// For each unit and agent, of the last read: the lane and the clock.
    reads: Vec<(u8, u32)>,
    /// `clocks[a][b]`: for a = b the clock of `a`; else until when the accesses of `b` come before those of `a`.
    clocks: Vec<Vec<u32>>,
}

/// Who accesses: a warp and a lane, or the copy engine.
#[derive(Clone, Copy)]
pub(crate) struct Who {
    pub(crate) agent: usize,
    pub(crate) lane: usize,
}

impl Shared {
    /// For a block of `warps` warps; the copy engine is the agent after them.
    pub(crate) fn new(bytes: usize, warps: usize) -> Self {
        let (agents, units) = (warps + 1, bytes.div_ceil(UNIT));
        let clocks = (0..agents).map(|a| (0..agents).map(|b| u32::from(a == b)).collect()).collect();
        let reads = vec![(0, 0); units * agents];
        Shared { bytes: vec![0xff; bytes], agents, writes: vec![(0, 0, 0); units], reads, clocks }
    }

    pub(crate) fn copy_engine(&self) -> usize {
        self.agents - 1
    }

    /// Whether `who`'s next access comes after an access by `agent` and `lane` at `clock`.
    fn ordered(&self, who: Who, agent: usize, lane: u8, clock: u32) -> bool {
        if clock == IN_FLIGHT {
            return false;
        }
        let now = self.clocks[who.agent][agent];
        if agent == who.agent { lane as usize == who.lane || clock < now } else { clock <= now }
    }

    fn units(&self, at: u64, bytes: usize) -> Result<std::ops::Range<usize>, String> {
        let end = usize::try_from(at).ok().and_then(|at| at.checked_add(bytes));
        match end {
            Some(end) if end <= self.bytes.len() => Ok(at as usize / UNIT..end.div_ceil(UNIT)),
            _ => Err(format!("shared memory out of bounds: {bytes} bytes at {at} of {}", self.bytes.len())),
        }
    }

    /// Notes a read; what is wrong with it, if something is.
    pub(crate) fn read(&mut self, who: Who, at: u64, bytes: usize) -> Result<&[u8], String> {
        self.read_at(who, at, bytes, self.clocks[who.agent][who.agent])
    }

    /// A read that goes on until it is noted once more, by [`Self::read`].
    pub(crate) fn read_in_flight(&mut self, who: Who, at: u64, bytes: usize) -> Result<&[u8], String> {
        self.read_at(who, at, bytes, IN_FLIGHT)
    }

    fn read_at(&mut self, who: Who, at: u64, bytes: usize, now: u32) -> Result<&[u8], String> {
        for unit in self.units(at, bytes)? {
            let (agent, lane, clock) = self.writes[unit];
            if clock == 0 {
                return Err(format!("shared memory at byte {at} is read but was never written"));
            }
            if !self.ordered(who, agent as usize, lane, clock) {
                return Err(format!("race in shared memory: byte {at} is read while {} writes it", name(agent, lane)));
            }
            let read = &mut self.reads[unit * self.agents + who.agent];
            let lane = if read.1 == now && read.0 as usize != who.lane { MANY } else { who.lane as u8 };
            *read = (lane, now);
        }
        Ok(&self.bytes[at as usize..at as usize + bytes])
    }

    /// Notes a write of `data`. A write that is `in_flight` lands later, by [`Self::land`].
    pub(crate) fn write(&mut self, who: Who, at: u64, data: &[u8], in_flight: bool) -> Result<(), String> {
        self.check_write(who, at, data.len())?;
        let now = if in_flight { IN_FLIGHT } else { self.clocks[who.agent][who.agent] };
        for unit in self.units(at, data.len())? {
            self.writes[unit] = (who.agent as u8, who.lane as u8, now);
        }
        if !in_flight {
            self.bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
        }
        Ok(())
    }

    /// A write by the copy engine on behalf of `who`: it comes after what `who` knows of, and before what acquires the
    /// engine's clock.
    pub(crate) fn write_by_engine(&mut self, who: Who, at: u64, data: &[u8]) -> Result<(), String> {
        self.check_write(who, at, data.len())?;
        self.land(Who { agent: self.copy_engine(), lane: 0 }, at, data);
        Ok(())
    }

    fn check_write(&self, who: Who, at: u64, bytes: usize) -> Result<(), String> {
        for unit in self.units(at, bytes)? {
            let (agent, lane, clock) = self.writes[unit];
            if clock != 0 && !self.ordered(who, agent as usize, lane, clock) {
                let writer = name(agent, lane);
                return Err(format!("race in shared memory: byte {at} is written while {writer} writes it"));
            }
            for agent in 0..self.agents {
                let (lane, clock) = self.reads[unit * self.agents + agent];
                if clock != 0 && !self.ordered(who, agent, lane, clock) {
                    let reader = name(agent as u8, lane);
                    return Err(format!("race in shared memory: byte {at} is written while {reader} reads it"));
                }
            }
        }
        Ok(())
    }

    /// A write that was in flight lands.
    pub(crate) fn land(&mut self, who: Who, at: u64, data: &[u8]) {
        let now = self.clocks[who.agent][who.agent];
        for unit in at as usize / UNIT..(at as usize + data.len()).div_ceil(UNIT) {
            self.writes[unit] = (who.agent as u8, who.lane as u8, now);
        }
        self.bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
    }

    /// All of `agents` meet at a barrier.
    pub(crate) fn barrier(&mut self, agents: impl Iterator<Item = usize> + Clone) {
        let mut joined = vec![0; self.agents];
        for agent in agents.clone() {
            joined.iter_mut().zip(&self.clocks[agent]).for_each(|(j, c)| *j = (*j).max(*c));
        }
        for agent in agents {
            self.clocks[agent].clone_from(&joined);
            self.clocks[agent][agent] += 1;
        }
    }

    /// The lanes of a warp meet.
    pub(crate) fn advance(&mut self, agent: usize) {
        self.clocks[agent][agent] += 1;
    }

    /// What `agent` has done and knows, for others to join; what it does from now on is not in it.
    pub(crate) fn release(&mut self, agent: usize, into: &mut Vec<u32>) {
        into.resize(self.agents, 0);
        into.iter_mut().zip(&self.clocks[agent]).for_each(|(i, c)| *i = (*i).max(*c));
        self.advance(agent);
    }

    /// `agent` comes after what was released.
    pub(crate) fn acquire(&mut self, agent: usize, from: &[u32]) {
        let own = self.clocks[agent][agent];
        self.clocks[agent].iter_mut().zip(from).for_each(|(c, f)| *c = (*c).max(*f));
        // Lanes of the warp that did not wait are not in what was released: its own clock moves on.
        self.clocks[agent][agent] = own + 1;
    }
}

fn name(agent: u8, lane: u8) -> String {
    match lane {
        MANY => format!("warp {agent}"),
        lane => format!("thread {}", u32::from(agent) * 32 + u32::from(lane)),
    }
}
