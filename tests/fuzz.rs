//! The fuzz targets of `tests/fuzz`, on seeded mutants of the fixtures: so many of them, on every check.

#[path = "fuzz/src/counting.rs"]
mod counting;
#[path = "fuzz/src/targets.rs"]
mod targets;

use crosscoder::info::Style;
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
    // The seeds as they are, then mutants; in Miri, which takes seconds for each, these alone.
    let from = if cfg!(miri) { seeds.len() as u64 } else { 0 };
    for n in from..seeds.len() as u64 + executions {
        let bytes = seeds.get(n as usize).cloned().unwrap_or_else(|| mutant(&seeds, &mut random));
        let start = Instant::now();
        let kept = catch_unwind(AssertUnwindSafe(|| target(&bytes)));
        slowest = slowest.max(start.elapsed());
        if kept.is_err() || slowest > LONGEST && !cfg!(miri) {
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

/// Pickles that make as much of little as the limits allow. Deflated, most would have some kilobytes.
#[test]
fn little_costs_little() {
    const MANY: usize = 2_000_000;
    let of = |parts: &[&[u8]]| [b"\x80\x02", &parts.concat()[..], b"."].concat();
    let times = |count: usize, piece: &[u8]| piece.repeat(count);
    let text = |length: usize, of: &str| {
        [&b"X"[..], &((length * of.len()) as u32).to_le_bytes(), of.repeat(length).as_bytes(), b"q\x000"].concat()
    };
    let integers = |count: u32, with: &[u8]| {
        (0..count).flat_map(|n| [&b"J"[..], &n.to_le_bytes(), with].concat()).collect::<Vec<u8>>()
    };
    // A tensor of `dims` sizes of 1, by three bytes: rebuild and arguments from the memo, the call.
    let tensor = |dims: usize| {
        let sizes = [&b"("[..], &b"K\x01".repeat(dims), b"t"].concat();
        let storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x80tQ";
        let rebuild = b"ctorch._utils\n_rebuild_tensor_v2\nq\x010";
        [&rebuild[..], b"(", storage, b"K\0", &sizes, &sizes, b"\x89}tq\x020h\x01h\x02Rq\x000"].concat()
    };
    let device = b"ctorch\ndevice\nX\x40\0\0\0".iter().copied().chain([b'a'; 64]).chain(*b"\x85R").collect::<Vec<u8>>();
    let nested = |piece: &[u8]| {
        let sixteen = times(16, b"h\0");
        let level = [&b"("[..], &sixteen, b"tq\x000"].concat();
        [piece, b"q\x000", &level, &level, &level].concat()
    };
    // A dict of two keys, the value under both the dict before.
    let doubled = |key: &[u8]| {
        let level = [&b"}"[..], key, b"h\x05s", b"K\x01", b"h\x05sq\x050"].concat();
        [&b"K\x01q\x050"[..], &times(18, &level), b"h\x05"].concat()
    };
    let refers = |count: usize| [&b"]("[..], &times(count, b"h\0"), b"e"].concat();
    for (name, pickle) in [
        ("memo", of(&[b"N", &times(20 * MANY / 2, b"\x94")])),
        (
            "memo, by numbers",
            of(&[b"N", &(0..2_000_000u32).flat_map(|n| [&b"r"[..], &n.to_le_bytes()].concat()).collect::<Vec<_>>()]),
        ),
        ("marks", of(&[&times(10 * MANY, b"(")])),
        ("stack", of(&[&times(10 * MANY, b"N")])),
        ("list", of(&[b"]", &times(10, &[&b"("[..], &times(1_200_000, b"N"), b"e"].concat())])),
        ("lists", of(&[&times(MANY / 2, b"]Na0"), b"N"])),
        ("values", of(&[&times(MANY, b"G\0\0\0\0\0\0\0\x000"), b"]"])),
        ("strings", of(&[&times(1_500_000, b"X\x01\0\0\0a0"), b"]"])),
        ("bytearrays", of(&[&times(700_000, b"\x96\x01\0\0\0\0\0\0\0a0"), b"]"])),
        ("one key", of(&[b"}", &times(6, &[&b"("[..], &times(900_000, b"NN"), b"u"].concat())])),
        ("a million keys", of(&[b"}(", &integers(1_000_000, b"N"), b"u"])),
        ("a million keys, twice", of(&[b"}(", &integers(1_000_000, b"N"), &integers(1_000, b"N"), b"u"])),
        (
            "as much as goes",
            of(&[
                &times(900_000, b"G\0\0\0\0\0\0\0\x00\x940"),
                &[&b"]"[..], &times(3, &[&b"("[..], &times(1_500_000, b"N"), b"e"].concat()), b"0"].concat(),
                &[b"}(", &integers(1_000_000, b"\x94N")[..], b"u"].concat(),
            ]),
        ),
        ("tensors of 64 sizes", of(&[&tensor(64), &times(45_000, b"h\x01h\x02R0"), b"h\0"])),
        ("tensors", of(&[&tensor(1), &times(200_000, b"h\x01h\x02R0"), b"h\0"])),
        ("references to a tensor", of(&[&tensor(2), &refers(300_000)])),
        (
            "references to a tensor, and many tensors",
            of(&[&tensor(2), &times(200_000, b"h\x01h\x02R0"), &refers(300_000)]),
        ),
        (
            "tensors under a long key",
            of(&[&tensor(1), b"h\0q\x030", &text(1 << 20, "k"), b"}h\0", b"](", &times(30, b"h\x03"), b"es"]),
        ),
        ("references to a float", of(&[b"G\x80\x12\x34\x56\x78\x9a\xbc\xdeq\x000", &refers(4_000_000)])),
        ("references to an empty dict", of(&[b"}q\x000", &refers(4_000_000)])),
        ("references to a string that needs escapes", of(&[&text(60_000, "\u{1}"), &refers(100)])),
        ("a string that needs escapes", of(&[&text(8 << 20, "\u{7f}"), &refers(1)])),
        ("references to a device", of(&[&device, b"q\x000", &refers(700_000)])),
        ("a device's long name", of(&[b"ctorch\ndevice\n", &text(60_000, "a"), b"h\0\x85Rq\x000", &refers(60_000)])),
        ("a key of devices", of(&[b"}", &nested(&device), b"h\0Ns"])),
        ("a key of strings", of(&[b"}", &nested(&text(1000, "\u{1}")[..1005]), b"h\0Ns"])),
        ("doubled dicts", of(&[&doubled(b"N")])),
        ("doubled dicts with keys of devices", of(&[&nested(&device), &doubled(b"h\0")])),
        ("a long name", of(&[b"cos\n", &times(20 << 20, b"\x01"), b"\n"])),
        ("arguments", of(&[b"ctorch\nSize\n(", &times(MANY, b"N"), b"tR"])),
        (
            "a long storage key",
            of(&[b"(X\x07\0\0\0storagectorch\nFloatStorage\n", &text(20 << 20, "\u{1}"), b"h\0NK\x01tQ"]),
        ),
    ] {
        let path = targets::on_disk(&targets::archive_of(&pickle), "pt");
        let start = Instant::now();
        let (answer, written, held) = targets::tell(&path, Style::Json, false, usize::MAX);
        let took = start.elapsed();
        let said = answer.err().map(|e| e.to_string()).unwrap_or_default();
        println!(
            "{name}: {} bytes; {} MiB held, {written} bytes written, {took:?}; {said:.200}",
            pickle.len(),
            held >> 20
        );
        assert!(took < 4 * LONGEST, "{name} took {took:?}");
        assert!(said.len() < 4000, "{name}: {said}");
        std::fs::remove_file(path).unwrap();
    }
}
