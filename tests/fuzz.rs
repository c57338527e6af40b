//! The fuzz targets of `tests/fuzz`, on seeded mutants of the fixtures: so many of them, on every check.

#[path = "fuzz/src/counting.rs"]
mod counting;
#[path = "fuzz/src/targets.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Mutants of each target; `CROSSCODER_FUZZ_EXECUTIONS` asks for another number, `CROSSCODER_FUZZ_SEED` for others.
const EXECUTIONS: u64 = 20_000;
/// The longest that one may take, in a debug build on a busy machine.
const LONGEST: Duration = Duration::from_secs(5);

/// Random numbers: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to four changes of a seed, of the kinds that files suffer and attackers make.
fn mutant(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut bytes = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        let longest = [1, 4, 8, 64][random.below(4)];
        let length = 1 + random.below(longest);
        let end = (at + length).min(bytes.len());
        match random.below(8) {
            0 => bytes.get_mut(at).into_iter().for_each(|b| *b ^= 1 << random.below(8)),
            1 => bytes.get_mut(at).into_iter().for_each(|b| *b = random.next() as u8),
            // A number at the edge of its range.
            2 => {
                let number =
                    [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, 1 << 60, u64::MAX, i64::MAX as u64][random.below(9)];
                let number = number.to_le_bytes();
                bytes[at..end].iter_mut().zip(number).for_each(|(b, n)| *b = n);
            }
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            // A piece of another seed, in place of what is there or before it.
            5 | 6 => {
                let other = &seeds[random.below(seeds.len())];
                let from = random.below(other.len());
                let piece = other[from..(from + length).min(other.len())].to_vec();
                let upto = if random.below(2) == 0 { at } else { end };
                bytes.splice(at..upto, piece);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

fn run(name: &str) {
    let number = |variable: &str, default| std::env::var(variable).ok().map_or(default, |text| text.parse().unwrap());
    // Those of a checkpoint lie in a file, which takes its time.
    let executions = if name == "checkpoint" { EXECUTIONS / 10 } else { EXECUTIONS };
    let (seed, executions) = (number("CROSSCODER_FUZZ_SEED", 1), number("CROSSCODER_FUZZ_EXECUTIONS", executions));
    let target = targets::ALL.into_iter().find(|t| t.0 == name).unwrap().1;
    let seeds = targets::seeds(name, &Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures"), 8 << 10);
    assert!(seeds.len() > 10, "{name} has {} seeds", seeds.len());
    let mut random = Random(seed);
    let mut slowest = Duration::ZERO;
    for n in 0..seeds.len() as u64 + executions {
        // The seeds as they are, then mutants.
        let bytes = seeds.get(n as usize).cloned().unwrap_or_else(|| mutant(&seeds, &mut random));
        let start = Instant::now();
        let kept = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        slowest = slowest.max(start.elapsed());
        if kept.is_err() || slowest > LONGEST {
            let path = std::env::temp_dir().join(format!("crosscoder-fuzz-{name}-{seed}-{n}"));
            std::fs::write(&path, &bytes).unwrap();
            panic!(
                "{name}: execution {n} of seed {seed} failed or took {slowest:?}; its bytes are in {}",
                path.display()
            );
        }
    }
    println!("{name}: {executions} mutants of {} seeds, seed {seed}, the slowest took {slowest:?}", seeds.len());
}

#[test]
fn pt() {
    run("pt");
}

#[test]
fn pickle() {
    run("pickle");
}

#[test]
fn npy() {
    run("npy");
}

#[test]
fn safetensors() {
    run("safetensors");
}

#[test]
fn cfg() {
    run("cfg");
}

#[test]
fn checkpoint() {
    run("checkpoint");
}
