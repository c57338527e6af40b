//! Runs a kernel, block by block. A warp runs until it waits; lanes that branch apart run lowest instruction first, so
//! that they meet again. Blocks are independent and share the host's cores.

use crate::alu::Lanes;
use crate::float::{bf16_to_f32, f16_to_f32, truncate};
use crate::hopper::{Descriptor, Mbarrier, TensorMap, copy_box, wgmma};
use crate::memory::View;
use crate::parse::{Ins, Kernel, Op, Operand, Shuffle, Space, Special};
use crate::race::{Shared, Who};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

const ALL: u32 = u32::MAX;

/// A launch: everything that blocks have in common.
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) grid: (u32, u32),
    pub(crate) threads: u32,
    pub(crate) dynamic_bytes: usize,
    pub(crate) params: &'a [u8],
    pub(crate) memory: &'a View,
}

/// Runs all blocks; the first fault that is found, if there is one.
pub(crate) fn run(launch: &Launch) -> Result<(), String> {
    if launch.kernel.max_threads.is_some_and(|most| launch.threads > most) || launch.threads % 32 != 0 {
        return Err(format!("{}: {} threads a block", launch.kernel.name, launch.threads));
    }
    let blocks = launch.grid.0 as usize * launch.grid.1 as usize;
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(blocks.div_ceil(4)).max(1);
    let (next, failed, fault) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let block = next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                return;
            }
            let at = (block as u32 % launch.grid.0, block as u32 / launch.grid.0);
            if let Err(error) = Block::new(launch, at).run() {
                failed.store(true, Ordering::Relaxed);
                fault.lock().unwrap().get_or_insert(format!("{}, block {at:?}: {error}", launch.kernel.name));
            }
        }
    };
    if workers == 1 {
        work();
    } else {
        std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    }
    fault.into_inner().unwrap().map_or(Ok(()), Err)
}

struct Block<'a> {
    launch: &'a Launch<'a>,
    at: (u32, u32),
    warps: Vec<Warp>,
    shared: Shared,
    mbarriers: HashMap<u64, Mbarrier>,
    /// Grows whenever something happens that a warp may wait for.
    events: u64,
}

struct Warp {
    index: usize,
    regs: Vec<Lanes>,
    /// Lanes that have not returned.
    alive: u32,
    /// Where all living lanes are, or none if they are apart.
    together: Option<usize>,
    apart: [usize; 32],
    /// The barrier at which it waits, and how many threads meet there.
    waits: Option<(u64, Option<u64>)>,
    /// Products in flight: what they read.
    products: Vec<[Descriptor; 2]>,
    product_rows: u64,
    /// Asynchronous copies: groups that are closed, oldest first, and the one that is open.
    groups: Vec<Vec<Copy>>,
    open: Vec<Copy>,
    last_allocation: usize,
}

struct Copy {
    lane: usize,
    at: u64,
    data: Vec<u8>,
}

/// Why a warp stops.
enum Stop {
    Barrier(u64, Option<u64>),
    /// A barrier's phase is not over.
    NotYet,
    Done,
}

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

impl<'a> Block<'a> {
    fn new(launch: &'a Launch<'a>, at: (u32, u32)) -> Self {
        let count = launch.threads.div_ceil(32) as usize;
        let warp = |index| Warp {
            index,
            regs: vec![[0; 32]; launch.kernel.regs],
            alive: ALL,
            together: Some(0),
            apart: [0; 32],
            waits: None,
            products: Vec::new(),
            product_rows: 0,
            groups: Vec::new(),
            open: Vec::new(),
            last_allocation: 0,
        };
        let shared = Shared::new(launch.kernel.shared_bytes + launch.dynamic_bytes, count);
        let warps = (0..count).map(warp).collect();
        Block { launch, at, warps, shared, mbarriers: HashMap::new(), events: 0 }
    }

    fn run(mut self) -> Result<(), String> {
        loop {
            let before = self.events;
            for i in 0..self.warps.len() {
                if self.warps[i].waits.is_some() || self.warps[i].alive == 0 {
                    continue;
                }
                let mut warp = std::mem::replace(&mut self.warps[i], Warp::empty());
                let stop = self.run_warp(&mut warp);
                match stop? {
                    Stop::Barrier(id, threads) => warp.waits = Some((id, threads)),
                    Stop::Done => self.events += 1,
                    Stop::NotYet => {}
                }
                self.warps[i] = warp;
            }
            let living = self.warps.iter().filter(|w| w.alive != 0).count();
            if living == 0 {
                return Ok(());
            }
            let mut barriers: Vec<_> = self.warps.iter().filter_map(|w| w.waits).collect();
            barriers.dedup();
            for barrier in barriers {
                let here = |w: &Warp| w.waits == Some(barrier);
                let met: Vec<usize> = self.warps.iter().filter(|w| here(w)).map(|w| w.index).collect();
                if met.len() == barrier.1.map_or(living, |threads| threads as usize / 32) {
                    self.shared.barrier(met.iter().copied());
                    met.iter().for_each(|&i| self.warps[i].waits = None);
                    self.events += 1;
                }
            }
            if self.events == before {
                return Err("all threads wait for each other".into());
            }
        }
    }

    fn run_warp(&mut self, warp: &mut Warp) -> Result<Stop, String> {
        let code = &self.launch.kernel.code;
        loop {
            let (at, mask) = warp.next();
            let Some(ins) = code.get(at) else { return Err("the end of the code without a return".into()) };
            let exec = match ins.guard {
                None => mask,
                Some((pred, wanted)) => {
                    let pred = &warp.regs[pred];
                    mask & (0..32).fold(0, |m, lane| m | u32::from((pred[lane] != 0) == wanted) << lane)
                }
            };
            match ins.op {
                Op::Branch(target) => warp.branch(at, mask, exec, target),
                Op::Return => {
                    warp.branch(at, mask, 0, 0);
                    warp.alive &= !exec;
                    if warp.alive == 0 {
                        return Ok(Stop::Done);
                    }
                }
                Op::Barrier { id, threads } => {
                    if exec != warp.alive {
                        return Err(format!("thread {}: not all lanes meet at: {}", warp.index * 32, ins.text));
                    }
                    warp.branch(at, mask, 0, 0);
                    return Ok(Stop::Barrier(id, threads));
                }
                Op::MbarrierTry => {
                    let over = self.mbarrier_try(warp, ins, exec).map_err(|e| format!("{e}: {}", ins.text))?;
                    warp.branch(at, mask, 0, 0);
                    if !over {
                        return Ok(Stop::NotYet);
                    }
                }
                _ => {
                    if exec != 0 {
                        self.execute(warp, ins, exec).map_err(|e| format!("warp {}: {e}: {}", warp.index, ins.text))?;
                    }
                    warp.branch(at, mask, 0, 0);
                }
            }
        }
    }

    fn special(&self, warp: &Warp, which: Special) -> Lanes {
        let one = |v: u32| [u64::from(v); 32];
        match which {
            Special::Tid => std::array::from_fn(|lane| (warp.index * 32 + lane) as u64),
            Special::LaneId => std::array::from_fn(|lane| lane as u64),
            Special::Ntid => one(self.launch.threads),
            Special::Ctaid => one(self.at.0),
            Special::CtaidY => one(self.at.1),
            Special::Nctaid => one(self.launch.grid.0),
            Special::NctaidY => one(self.launch.grid.1),
            Special::Zero => one(0),
            Special::One => one(1),
        }
    }

    /// The value of an operand; `store` is used for what is in no register.
    fn value<'v>(&self, warp: &'v Warp, operand: &Operand, store: &'v mut Lanes) -> Result<&'v Lanes, String> {
        match operand {
            Operand::Reg(register) => Ok(&warp.regs[*register]),
            Operand::Imm(v) => {
                *store = [*v; 32];
                Ok(store)
            }
            Operand::Special(which) => {
                *store = self.special(warp, *which);
                Ok(store)
            }
            other => Err(format!("{other:?} has no value")),
        }
    }

    fn owned(&self, warp: &Warp, operand: &Operand) -> Result<Lanes, String> {
        let mut store = [0; 32];
        self.value(warp, operand, &mut store).copied()
    }

    fn address(&self, warp: &Warp, operand: &Operand) -> Result<Lanes, String> {
        let Operand::Mem(base, offset) = operand else { return Err(format!("{operand:?} is no address")) };
        let mut at = self.owned(warp, base)?;
        at.iter_mut().for_each(|a| *a = a.wrapping_add(*offset as u64));
        Ok(at)
    }

    fn global(&self, warp: &mut Warp, at: u64, bytes: usize) -> Result<*mut u8, String> {
        if at % bytes as u64 != 0 {
            return Err(format!("global memory: {bytes} bytes at {at:#x}, which is not aligned"));
        }
        let found = self.launch.memory.host(at, bytes, &mut warp.last_allocation);
        found.ok_or_else(|| format!("global memory out of bounds: {bytes} bytes at {at:#x}"))
    }

    fn execute(&mut self, warp: &mut Warp, ins: &Ins, exec: u32) -> Result<(), String> {
        match &ins.op {
            Op::Alu(function) => {
                let mut stores = [[0; 32]; 3];
                let [s0, s1, s2] = &mut stores;
                let zero = &[0; 32];
                let a = ins.from.first().map_or(Ok(zero), |o| self.value(warp, o, s0))?;
                let b = ins.from.get(1).map_or(Ok(zero), |o| self.value(warp, o, s1))?;
                let c = ins.from.get(2).map_or(Ok(zero), |o| self.value(warp, o, s2))?;
                let out = function(a, b, c);
                warp.set(&ins.to[0], &out, exec)
            }
            Op::BitFieldInsert => {
                let [a, b, at, count] = &ins.from[..] else { return Err("four sources".into()) };
                let (a, b) = (self.owned(warp, a)?, self.owned(warp, b)?);
                let (at, count) = (self.owned(warp, at)?, self.owned(warp, count)?);
                let out = std::array::from_fn(|l| {
                    let field = ((1u64 << count[l].min(32)) - 1) << at[l] & 0xffff_ffff;
                    (b[l] & !field) | (a[l] << at[l] & field)
                });
                warp.set(&ins.to[0], &out, exec)
            }
            Op::Unpack(bits) => {
                let from = self.owned(warp, &ins.from[0])?;
                for (i, to) in vector(&ins.to[0])?.iter().enumerate() {
                    let part = from.map(|v| v >> (bits * i as u32) & low_bits(*bits));
                    warp.set(to, &part, exec)?;
                }
                Ok(())
            }
            Op::Pack(bits) => {
                let mut out = [0; 32];
                for (i, from) in vector(&ins.from[0])?.iter().enumerate() {
                    let part = self.owned(warp, from)?;
                    (0..32).for_each(|l| out[l] |= (part[l] & low_bits(*bits)) << (bits * i as u32));
                }
                warp.set(&ins.to[0], &out, exec)
            }
            Op::Load { space, bytes, signed } => self.load(warp, ins, exec, *space, *bytes, *signed),
            Op::Store { space, bytes } => self.store(warp, ins, exec, *space, *bytes),
            Op::Atomic { max } => {
                let (at, value) = (self.address(warp, &ins.from[0])?, self.owned(warp, &ins.from[1])?);
                let mut out = [0; 32];
                for lane in lanes_of(exec) {
                    let word = self.global(warp, at[lane], 4)?.cast::<u32>();
                    // SAFETY: four aligned bytes of an allocation; blocks on other threads use the same operation.
                    let (word, value) = (unsafe { AtomicU32::from_ptr(word) }, value[lane] as u32);
                    let change = if *max { AtomicU32::fetch_max } else { AtomicU32::fetch_or };
                    out[lane] = u64::from(change(word, value, Ordering::Relaxed));
                }
                warp.set(&ins.to[0], &out, exec)
            }
            Op::WarpSync => {
                self.shared.advance(warp.index);
                Ok(())
            }
            Op::Ballot => {
                let (pred, mask) = (self.owned(warp, &ins.from[0])?, self.owned(warp, &ins.from[1])?);
                all_named(&mask, exec)?;
                let ballot = lanes_of(exec).fold(0u32, |b, l| b | u32::from(pred[l] != 0) << l);
                warp.set(&ins.to[0], &[u64::from(ballot); 32], exec)
            }
            Op::Shuffle(mode) => self.shuffle(warp, ins, exec, *mode),
            Op::CopyAsync => self.copy_async(warp, ins, exec),
            Op::CopyCommit => {
                let group = std::mem::take(&mut warp.open);
                warp.groups.push(group);
                Ok(())
            }
            Op::CopyWait => {
                let Operand::Imm(left) = ins.from[0] else { return Err("a number of groups".into()) };
                while warp.groups.len() > left as usize {
                    for copy in warp.groups.remove(0) {
                        self.shared.land(Who { agent: warp.index, lane: copy.lane }, copy.at, &copy.data);
                    }
                }
                Ok(())
            }
            Op::LoadMatrix { transposed } => self.load_matrix(warp, ins, exec, *transposed),
            Op::Mma { bf16 } => self.mma(warp, ins, exec, *bf16),
            Op::MbarrierInit => {
                let (at, arrivals) = (self.address(warp, &ins.to[0])?, self.owned(warp, &ins.from[0])?);
                for lane in lanes_of(exec) {
                    aligned(at[lane], 8)?;
                    self.shared.write(Who { agent: warp.index, lane }, at[lane], &[0; 8], false)?;
                    self.mbarriers.insert(at[lane], Mbarrier::new(arrivals[lane]));
                }
                Ok(())
            }
            Op::MbarrierArrive { expect } => {
                let at = self.address(warp, &ins.from[0])?;
                let bytes = if *expect { self.owned(warp, &ins.from[1])? } else { [0; 32] };
                for lane in lanes_of(exec) {
                    self.shared.read(Who { agent: warp.index, lane }, at[lane], 8)?;
                    let barrier = self.mbarriers.get_mut(&at[lane]).ok_or("there is no barrier")?;
                    barrier.arrive(&mut self.shared, warp.index, bytes[lane])?;
                    self.events += 1;
                }
                Ok(())
            }
            Op::TensorCopy => {
                let [Operand::Tensor(map, place), barrier] = &ins.from[..] else {
                    return Err("a map, a barrier".into());
                };
                let (to, barrier) = (self.address(warp, &ins.to[0])?, self.address(warp, barrier)?);
                let map = self.owned(warp, map)?;
                let (x, y) = (self.owned(warp, &place[0])?, self.owned(warp, &place[1])?);
                for lane in lanes_of(exec) {
                    let map = TensorMap::from_bytes(self.launch.params.get(map[lane] as usize..).unwrap_or_default())?;
                    let (who, place) = (Who { agent: warp.index, lane }, (x[lane], y[lane]));
                    let bytes = copy_box(&mut self.shared, self.launch.memory, who, &map, place, to[lane])?;
                    let barrier = self.mbarriers.get_mut(&barrier[lane]).ok_or("there is no barrier")?;
                    barrier.complete(&mut self.shared, bytes);
                    self.events += 1;
                }
                Ok(())
            }
            Op::Wgmma { bf16, n } => {
                whole_warp(exec)?;
                // Behind the descriptors and whether to keep: both signs, then whether each operand is not k-minor.
                let operand = |i: usize| match ins.from[5 + i] {
                    Operand::Imm(transposed @ 0..=1) => {
                        Descriptor::new(self.owned(warp, &ins.from[i])?[0], transposed == 0)
                    }
                    _ => Err("how an operand of wgmma lies".to_string()),
                };
                let operands = [operand(0)?, operand(1)?];
                let keep = self.owned(warp, &ins.from[2])?[0] != 0;
                let registers = vector(&ins.to[0])?;
                let mut d = registers.iter().map(|o| self.owned(warp, o)).collect::<Result<Vec<_>, _>>()?;
                if d.len() * 2 != *n {
                    return Err(format!("{} registers", d.len()));
                }
                wgmma(&mut self.shared, warp.index, operands, *n, *bf16, keep, &mut d)?;
                warp.products.push(operands);
                warp.product_rows = *n as u64;
                registers.iter().zip(&d).try_for_each(|(to, d)| warp.set(to, d, exec))
            }
            Op::WgmmaCommit => Ok(()),
            Op::WgmmaWait => {
                let Operand::Imm(0) = ins.from[0] else { return Err("only a wait for all products".into()) };
                // Until now the products may have been reading.
                let who = Who { agent: warp.index, lane: 0 };
                let first = warp.index as u64 % 4 * 16;
                for [a, b] in std::mem::take(&mut warp.products) {
                    for at in [a.chunks(first..first + 16), b.chunks(0..warp.product_rows)].concat() {
                        self.shared.read(who, at, 16)?;
                    }
                }
                Ok(())
            }
            Op::Nothing => Ok(()),
            Op::Branch(_) | Op::Return | Op::Barrier { .. } | Op::MbarrierTry => unreachable!("handled by run_warp"),
        }
    }

    /// Whether the phase is over; the destination says so, too.
    fn mbarrier_try(&mut self, warp: &mut Warp, ins: &Ins, exec: u32) -> Result<bool, String> {
        let (at, parity) = (self.address(warp, &ins.from[0])?, self.owned(warp, &ins.from[1])?);
        let mut out = [0; 32];
        for lane in lanes_of(exec) {
            self.shared.read(Who { agent: warp.index, lane }, at[lane], 8)?;
            let barrier = self.mbarriers.get(&at[lane]).ok_or("there is no barrier")?;
            out[lane] = u64::from(barrier.try_wait(&mut self.shared, warp.index, parity[lane]));
        }
        warp.set(&ins.to[0], &out, exec)?;
        let over = lanes_of(exec).all(|lane| out[lane] == 1);
        self.events += u64::from(over);
        Ok(over)
    }

    fn load(
        &mut self,
        warp: &mut Warp,
        ins: &Ins,
        exec: u32,
        space: Space,
        bytes: usize,
        signed: bool,
    ) -> Result<(), String> {
        let at = self.address(warp, &ins.from[0])?;
        let to = match &ins.to[0] {
            Operand::Vector(to) => &to[..],
            to => std::slice::from_ref(to),
        };
        let all = bytes * to.len();
        let mut out = [[0u64; 32]; 4];
        for lane in lanes_of(exec) {
            let mut data = [0u8; 16];
            let data = &mut data[..all];
            match space {
                Space::Global => {
                    let from = self.global(warp, at[lane], all)?;
                    // SAFETY: that many bytes of an allocation.
                    unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), all) };
                }
                Space::Shared => {
                    aligned(at[lane], all)?;
                    let who = Who { agent: warp.index, lane };
                    data.copy_from_slice(self.shared.read(who, at[lane], all)?);
                }
                Space::Param => {
                    let from = at[lane] as usize;
                    data.copy_from_slice(self.launch.params.get(from..from + all).ok_or("no such parameter")?);
                }
            }
            for (i, piece) in data.chunks_exact(bytes).enumerate() {
                let mut word = [0u8; 8];
                word[..bytes].copy_from_slice(piece);
                let value = u64::from_le_bytes(word);
                out[i][lane] = match (signed, bytes) {
                    (true, 1) => u64::from(value as i8 as i32 as u32),
                    (true, 2) => u64::from(value as i16 as i32 as u32),
                    _ => value,
                };
            }
        }
        to.iter().zip(&out).try_for_each(|(to, out)| warp.set(to, out, exec))
    }

    fn store(&mut self, warp: &mut Warp, ins: &Ins, exec: u32, space: Space, bytes: usize) -> Result<(), String> {
        let at = self.address(warp, &ins.from[0])?;
        let from = match &ins.from[1] {
            Operand::Vector(from) => &from[..],
            from => std::slice::from_ref(from),
        };
        let values = from.iter().map(|o| self.owned(warp, o)).collect::<Result<Vec<_>, _>>()?;
        let all = bytes * from.len();
        for lane in lanes_of(exec) {
            let mut data = [0u8; 16];
            for (piece, value) in data.chunks_exact_mut(bytes).zip(&values) {
                piece.copy_from_slice(&value[lane].to_le_bytes()[..bytes]);
            }
            match space {
                Space::Global => {
                    let to = self.global(warp, at[lane], all)?;
                    // SAFETY: that many bytes of an allocation.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, all) };
                }
                Space::Shared => {
                    aligned(at[lane], all)?;
                    self.shared.write(Who { agent: warp.index, lane }, at[lane], &data[..all], false)?;
                }
                Space::Param => return Err("parameters cannot be written".into()),
            }
        }
        Ok(())
    }

    fn shuffle(&mut self, warp: &mut Warp, ins: &Ins, exec: u32, mode: Shuffle) -> Result<(), String> {
        let [value, by, clamp, mask] = &ins.from[..] else { return Err("four sources".into()) };
        let (value, by) = (self.owned(warp, value)?, self.owned(warp, by)?);
        let (clamp, mask) = (self.owned(warp, clamp)?, self.owned(warp, mask)?);
        all_named(&mask, exec)?;
        let (mut out, mut inside) = ([0; 32], [0; 32]);
        for lane in lanes_of(exec) {
            if clamp[lane] >> 8 != 0 {
                return Err("only shuffles over the whole warp".into());
            }
            let (by, most) = (by[lane] as usize & 31, clamp[lane] as usize & 31);
            let from = match mode {
                Shuffle::Xor => Some(lane ^ by).filter(|l| *l <= most),
                Shuffle::Up => lane.checked_sub(by).filter(|l| *l >= most),
                Shuffle::Down => Some(lane + by).filter(|l| *l <= most),
                Shuffle::Index => Some(by).filter(|l| *l <= most),
            };
            if from.is_some_and(|from| exec >> from & 1 == 0) {
                return Err("a value from a lane that does not take part".into());
            }
            out[lane] = value[from.unwrap_or(lane)];
            inside[lane] = u64::from(from.is_some());
        }
        warp.set(&ins.to[0], &out, exec)?;
        ins.to.get(1).map_or(Ok(()), |to| warp.set(to, &inside, exec))
    }

    fn copy_async(&mut self, warp: &mut Warp, ins: &Ins, exec: u32) -> Result<(), String> {
        let [from, bytes, rest @ ..] = &ins.from[..] else { return Err("a source and a size".into()) };
        let (to, from) = (self.address(warp, &ins.to[0])?, self.address(warp, from)?);
        let Operand::Imm(16) = bytes else { return Err("only copies of 16 bytes".into()) };
        let count = rest.first().map_or(Ok([16; 32]), |o| self.owned(warp, o))?;
        for lane in lanes_of(exec) {
            let mut data = vec![0; 16];
            let count = count[lane] as usize;
            if count > 16 {
                return Err(format!("{count} bytes of 16"));
            }
            aligned(to[lane], 16)?;
            if count > 0 {
                aligned(from[lane], 16)?;
                let found = self.launch.memory.host(from[lane], count, &mut warp.last_allocation);
                let from =
                    found.ok_or_else(|| format!("global memory out of bounds: {count} bytes at {:#x}", from[lane]))?;
                // SAFETY: that many bytes of an allocation.
                unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), count) };
            }
            self.shared.write(Who { agent: warp.index, lane }, to[lane], &data, true)?;
            warp.open.push(Copy { lane, at: to[lane], data });
        }
        Ok(())
    }

    /// Matrices of 8 rows of 16 bytes; the row addresses of matrix `i` come from lanes 8·i .. 8·i + 8.
    fn load_matrix(&mut self, warp: &mut Warp, ins: &Ins, exec: u32, transposed: bool) -> Result<(), String> {
        whole_warp(exec)?;
        let at = self.address(warp, &ins.from[0])?;
        for (i, to) in vector(&ins.to[0])?.iter().enumerate() {
            let mut rows = [[0u16; 8]; 8];
            for (row, lane) in rows.iter_mut().zip(i * 8..) {
                aligned(at[lane], 16)?;
                let data = self.shared.read(Who { agent: warp.index, lane }, at[lane], 16)?;
                for (v, pair) in row.iter_mut().zip(data.chunks_exact(2)) {
                    *v = u16::from_le_bytes([pair[0], pair[1]]);
                }
            }
            let out = std::array::from_fn(|lane| {
                let (p, q) = (lane / 4, lane % 4 * 2);
                let (low, high) = if transposed { (rows[q][p], rows[q + 1][p]) } else { (rows[p][q], rows[p][q + 1]) };
                u64::from(low) | u64::from(high) << 16
            });
            warp.set(to, &out, exec)?;
        }
        Ok(())
    }

    /// d [16, 8] = a [16, 16] · b [16, 8] + c, each in the layout of fragments that the PTX manual draws for m16n8k16.
    /// The sum of the products is exact here and truncated to float32, as tensor cores do not round to nearest.
    fn mma(&mut self, warp: &mut Warp, ins: &Ins, exec: u32, bf16: bool) -> Result<(), String> {
        whole_warp(exec)?;
        let wide = |v: u64| f64::from(if bf16 { bf16_to_f32(v as u16) } else { f16_to_f32(v as u16) });
        let (mut a, mut b, mut c) = ([[0f64; 16]; 16], [[0f64; 16]; 8], [[0f64; 8]; 16]);
        for (j, from) in vector(&ins.from[0])?.iter().enumerate() {
            let values = self.owned(warp, from)?;
            for lane in 0..32 {
                let (row, col) = (lane / 4 + j % 2 * 8, lane % 4 * 2 + j / 2 * 8);
                a[row][col] = wide(values[lane]);
                a[row][col + 1] = wide(values[lane] >> 16);
            }
        }
        for (j, from) in vector(&ins.from[1])?.iter().enumerate() {
            let values = self.owned(warp, from)?;
            for lane in 0..32 {
                let (k, n) = (lane % 4 * 2 + j * 8, lane / 4);
                b[n][k] = wide(values[lane]);
                b[n][k + 1] = wide(values[lane] >> 16);
            }
        }
        let place = |lane: usize, j: usize| (lane / 4 + j / 2 * 8, lane % 4 * 2 + j % 2);
        for (j, from) in vector(&ins.from[2])?.iter().enumerate() {
            let values = self.owned(warp, from)?;
            for lane in 0..32 {
                let (m, n) = place(lane, j);
                c[m][n] = f64::from(f32::from_bits(values[lane] as u32));
            }
        }
        for m in 0..16 {
            for n in 0..8 {
                c[m][n] += a[m].iter().zip(&b[n]).map(|(x, y)| x * y).sum::<f64>();
            }
        }
        for (j, to) in vector(&ins.to[0])?.iter().enumerate() {
            let out = std::array::from_fn(|lane| {
                let (m, n) = place(lane, j);
                u64::from(truncate(c[m][n]).to_bits())
            });
            warp.set(to, &out, exec)?;
        }
        Ok(())
    }
}

impl Warp {
    fn empty() -> Self {
        Warp {
            index: 0,
            regs: Vec::new(),
            alive: 0,
            together: None,
            apart: [0; 32],
            waits: None,
            products: Vec::new(),
            product_rows: 0,
            groups: Vec::new(),
            open: Vec::new(),
            last_allocation: 0,
        }
    }

    /// The next instruction and the lanes that execute it.
    fn next(&self) -> (usize, u32) {
        if let Some(at) = self.together {
            return (at, self.alive);
        }
        let at = lanes_of(self.alive).map(|l| self.apart[l]).min().unwrap_or(usize::MAX);
        (at, lanes_of(self.alive).fold(0, |m, l| m | u32::from(self.apart[l] == at) << l))
    }

    /// The lanes `taken` of `mask` go to `target`, the others to the instruction after `at`.
    fn branch(&mut self, at: usize, mask: u32, taken: u32, target: usize) {
        if self.together.is_some() {
            if taken == 0 {
                self.together = Some(at + 1);
                return;
            }
            if taken == mask {
                self.together = Some(target);
                return;
            }
            self.together = None;
        }
        for lane in lanes_of(mask) {
            self.apart[lane] = if taken >> lane & 1 == 1 { target } else { at + 1 };
        }
        let mut places = lanes_of(self.alive).map(|l| self.apart[l]);
        let first = places.next();
        if places.all(|p| Some(p) == first) {
            self.together = first;
        }
    }

    fn set(&mut self, to: &Operand, value: &Lanes, exec: u32) -> Result<(), String> {
        match to {
            Operand::Reg(register) if exec == ALL => self.regs[*register] = *value,
            Operand::Reg(register) => lanes_of(exec).for_each(|l| self.regs[*register][l] = value[l]),
            Operand::Nothing => {}
            other => return Err(format!("{other:?} cannot be written")),
        }
        Ok(())
    }
}

fn vector(operand: &Operand) -> Result<&[Operand], String> {
    match operand {
        Operand::Vector(v) => Ok(v),
        other => Err(format!("{other:?} is no vector")),
    }
}

fn low_bits(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

fn aligned(at: u64, bytes: usize) -> Result<(), String> {
    if at % bytes as u64 == 0 {
        Ok(())
    } else {
        Err(format!("shared memory: {bytes} bytes at {at}, which is not aligned"))
    }
}

fn whole_warp(exec: u32) -> Result<(), String> {
    if exec == ALL { Ok(()) } else { Err("not all lanes take part".into()) }
}

/// The lanes that a `.sync` instruction names are those that execute it.
fn all_named(mask: &Lanes, exec: u32) -> Result<(), String> {
    if lanes_of(exec).all(|l| mask[l] as u32 == exec) { Ok(()) } else { Err("the mask names other lanes".into()) }
}
