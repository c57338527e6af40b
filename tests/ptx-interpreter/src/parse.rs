//! PTX text to instructions: the subset that the kernels in `ptx/` use. What is not understood is an error.

use crate::alu::{Alu, alu};
use std::collections::HashMap;

pub(crate) struct Module {
    pub(crate) kernels: HashMap<String, Kernel>,
}

pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Ins>,
    pub(crate) regs: usize,
    /// Offset and size of each parameter.
    pub(crate) params: Vec<(usize, usize)>,
    /// Shared memory that is not dynamic, up to where the dynamic begins.
    pub(crate) shared_bytes: usize,
    /// `.maxntid`, if it is stated.
    pub(crate) max_threads: Option<u32>,
}

impl Kernel {
    pub(crate) fn params_bytes(&self) -> usize {
        self.params.last().map_or(0, |(offset, size)| offset + size)
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    Unsigned,
    Signed,
    Bits,
    Float,
    BFloat,
    Pred,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Ty {
    pub(crate) kind: Kind,
    pub(crate) bits: u32,
}

impl Ty {
    fn parse(s: &str) -> Option<Ty> {
        let (kind, bits) = match s {
            "pred" => (Kind::Pred, "1"),
            "bf16" => (Kind::BFloat, "16"),
            _ => match s.split_at_checked(1)? {
                ("u", bits) => (Kind::Unsigned, bits),
                ("s", bits) => (Kind::Signed, bits),
                ("b", bits) => (Kind::Bits, bits),
                ("f", bits) => (Kind::Float, bits),
                _ => return None,
            },
        };
        let bits = bits.parse().ok()?;
        matches!(bits, 1 | 8 | 16 | 32 | 64).then_some(Ty { kind, bits })
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Operand {
    Reg(usize),
    Imm(u64),
    Special(Special),
    /// `[base + offset]`
    Mem(Box<Operand>, i64),
    /// `[base, {x, y}]`: a tensor map and where in the tensor.
    Tensor(Box<Operand>, Vec<Operand>),
    Vector(Vec<Operand>),
    Nothing,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Special {
    Tid,
    Ntid,
    Ctaid,
    Nctaid,
    LaneId,
    /// y or z of any of them: blocks have one dimension, grids two.
    CtaidY,
    NctaidY,
    Zero,
    One,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Space {
    Global,
    Shared,
    Param,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Shuffle {
    Xor,
    Up,
    Down,
    Index,
}

pub(crate) enum Op {
    /// Destination 0 from sources 0, 1, 2.
    Alu(Alu),
    BitFieldInsert,
    /// Destinations, each of so many bits, from one source.
    Unpack(u32),
    /// One destination from sources of so many bits.
    Pack(u32),
    Load {
        space: Space,
        bytes: usize,
        signed: bool,
    },
    Store {
        space: Space,
        bytes: usize,
    },
    Atomic {
        max: bool,
    },
    Branch(usize),
    Return,
    /// Number, and how many threads meet; none: all of the block.
    Barrier {
        id: u64,
        threads: Option<u64>,
    },
    WarpSync,
    Ballot,
    Shuffle(Shuffle),
    CopyAsync,
    CopyCommit,
    CopyWait,
    LoadMatrix {
        transposed: bool,
    },
    Mma {
        bf16: bool,
    },
    MbarrierInit,
    MbarrierArrive {
        expect: bool,
    },
    MbarrierTry,
    TensorCopy,
    Wgmma {
        bf16: bool,
        n: usize,
    },
    WgmmaCommit,
    WgmmaWait,
    /// A fence, a hint: nothing that an interpreter in program order has to do.
    Nothing,
}

pub(crate) struct Ins {
    pub(crate) op: Op,
    /// Runs where the predicate has this value.
    pub(crate) guard: Option<(usize, bool)>,
    pub(crate) to: Vec<Operand>,
    pub(crate) from: Vec<Operand>,
    pub(crate) text: String,
}

type Result<T> = std::result::Result<T, String>;

/// Symbols that stand for addresses.
#[derive(Default, Clone)]
struct Names {
    regs: HashMap<String, usize>,
    /// Addresses in shared memory.
    shared: HashMap<String, u64>,
    /// Offsets in the parameters.
    params: HashMap<String, u64>,
}

/// A declaration `.shared .align 16 .b8 name[bytes]`: alignment, name, bytes (none: dynamic).
fn shared_declaration(s: &str) -> Result<(u64, String, Option<u64>)> {
    let words: Vec<&str> = s.split_whitespace().collect();
    let align = words.iter().position(|w| *w == ".align").and_then(|i| words.get(i + 1)?.parse().ok()).unwrap_or(1);
    let elements = words.iter().find_map(|w| Ty::parse(w.strip_prefix('.')?)).ok_or_else(|| format!("type in {s}"))?;
    let (name, count) = words.last().and_then(|w| w.split_once('[')).ok_or_else(|| format!("no array: {s}"))?;
    let count = count.trim_end_matches(']');
    let bytes = match count {
        "" => None,
        _ => Some(count.parse::<u64>().map_err(|e| format!("{s}: {e}"))? * u64::from(elements.bits) / 8),
    };
    Ok((align, name.to_owned(), bytes))
}

impl Module {
    pub(crate) fn parse(text: &str) -> Result<Module> {
        let text: String = text.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
        let mut kernels = HashMap::new();
        let mut outside = Vec::new(); // shared memory that is declared outside of kernels
        let mut rest = text.as_str();
        loop {
            let next = rest.find(".entry");
            let between = &rest[..next.unwrap_or(rest.len())];
            for statement in between.split(';').filter(|s| s.contains(".shared")) {
                let at = statement.find(".extern").or(statement.find(".shared")).unwrap_or(0);
                outside.push(shared_declaration(&statement[at..])?);
            }
            let Some(next) = next else { break };
            rest = &rest[next + ".entry".len()..];
            let (name, after) = rest.split_once('(').ok_or("an entry without parameters")?;
            let (params, after) = after.split_once(')').ok_or("an entry without )")?;
            let open = after.find('{').ok_or("an entry without a body")?;
            let close = matching_brace(after, open)?;
            let kernel = kernel(name.trim(), params, &after[..open], &after[open + 1..close], &outside)
                .map_err(|e| format!("{}: {e}", name.trim()))?;
            kernels.insert(kernel.name.clone(), kernel);
            rest = &after[close..];
        }
        Ok(Module { kernels })
    }
}

fn matching_brace(text: &str, open: usize) -> Result<usize> {
    let mut depth = 0;
    for (i, c) in text[open..].char_indices() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        if depth == 0 {
            return Ok(open + i);
        }
    }
    Err("a brace that does not close".into())
}

fn kernel(
    name: &str,
    params: &str,
    directives: &str,
    body: &str,
    outside: &[(u64, String, Option<u64>)],
) -> Result<Kernel> {
    let mut names = Names::default();
    let mut layout = Vec::new();
    let mut offset = 0usize;
    for param in params.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let words: Vec<&str> = param.split_whitespace().collect();
        let ty = words.iter().find_map(|w| Ty::parse(w.strip_prefix('.')?)).ok_or("a parameter without a type")?;
        let last = words.last().ok_or("an empty parameter")?;
        let (symbol, count) = match last.split_once('[') {
            Some((symbol, count)) => (symbol, count.trim_end_matches(']').parse().map_err(|_| "array of parameters")?),
            None => (*last, 1),
        };
        let bytes = ty.bits as usize / 8 * count;
        let align = match words.iter().position(|w| *w == ".align") {
            Some(i) if count > 1 => words.get(i + 1).and_then(|w| w.parse().ok()).ok_or("alignment")?,
            _ => ty.bits as usize / 8,
        };
        offset = offset.next_multiple_of(align);
        names.params.insert(symbol.to_owned(), offset as u64);
        layout.push((offset, bytes));
        offset += bytes;
    }
    let max_threads =
        directives.split_once(".maxntid").and_then(|(_, rest)| rest.split([',', '\n']).next()?.trim().parse().ok());

    let statements = statements(body);
    // First what is declared, so that instructions can refer to it.
    let mut declared: Vec<_> = outside.to_vec();
    let mut labels = HashMap::new();
    let mut instructions = Vec::new();
    for s in &statements {
        if let Some(label) = s.strip_suffix(':') {
            if labels.insert(label.to_owned(), instructions.len()).is_some() {
                return Err(format!("label {label} twice"));
            }
        } else if let Some(registers) = s.strip_prefix(".reg") {
            let (_, list) = registers.trim().split_once(char::is_whitespace).ok_or("registers without a type")?;
            for register in list.split(',').map(str::trim) {
                let all = match register.split_once('<') {
                    Some((prefix, n)) => {
                        let n: usize = n.trim_end_matches('>').parse().map_err(|_| "count of registers")?;
                        (0..n).map(|i| format!("{prefix}{i}")).collect()
                    }
                    None => vec![register.to_owned()],
                };
                for register in all {
                    let next = names.regs.len();
                    names.regs.entry(register).or_insert(next);
                }
            }
        } else if s.starts_with(".shared") {
            declared.push(shared_declaration(s)?);
        } else if s.starts_with('.') {
            if !s.starts_with(".pragma") {
                return Err(format!("not supported: {s}"));
            }
        } else {
            instructions.push(s.as_str());
        }
    }
    let mut shared_bytes = 0u64;
    for (align, symbol, bytes) in declared.iter().filter(|d| d.2.is_some() && body.contains(&d.1)) {
        shared_bytes = shared_bytes.next_multiple_of(*align);
        names.shared.insert(symbol.clone(), shared_bytes);
        shared_bytes += bytes.unwrap_or(0);
    }
    for (align, symbol, _) in declared.iter().filter(|d| d.2.is_none() && body.contains(&d.1)) {
        shared_bytes = shared_bytes.next_multiple_of(*align);
        names.shared.insert(symbol.clone(), shared_bytes);
    }
    let code = instructions
        .iter()
        .map(|s| instruction(s, &names, &labels).map_err(|e| format!("{s}: {e}")))
        .collect::<Result<Vec<_>>>()?;
    Ok(Kernel {
        name: name.to_owned(),
        code,
        regs: names.regs.len(),
        params: layout,
        shared_bytes: shared_bytes as usize,
        max_threads,
    })
}

/// Statements without `;`, labels with `:`. Braces that open a scope are dropped: names in scopes are unique.
fn statements(body: &str) -> Vec<String> {
    let (mut out, mut current, mut in_vector) = (Vec::new(), String::new(), 0);
    for c in body.chars() {
        match c {
            '{' if in_vector == 0 && current.trim().is_empty() => current.clear(),
            '}' if in_vector == 0 => current.clear(),
            '{' => {
                in_vector += 1;
                current.push(c);
            }
            '}' => {
                in_vector -= 1;
                current.push(c);
            }
            ';' => {
                out.push(current.trim().to_owned());
                current.clear();
            }
            ':' if !current.trim().is_empty() && !current.trim().contains([' ', '\t', '.', ':']) => {
                out.push(format!("{}:", current.trim()));
                current.clear();
            }
            _ => current.push(c),
        }
    }
    out.retain(|s| !s.is_empty());
    out
}

fn split_operands(text: &str) -> Vec<String> {
    let (mut out, mut current, mut depth) = (Vec::new(), String::new(), 0);
    for c in text.chars() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' | '|' if depth == 0 => {
                out.push(std::mem::take(&mut current).trim().to_owned());
                continue;
            }
            _ => {}
        }
        current.push(c);
    }
    if !current.trim().is_empty() {
        out.push(current.trim().to_owned());
    }
    out
}

fn operand(text: &str, names: &Names) -> Result<Operand> {
    let text = text.trim();
    if let Some(list) = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')) {
        return Ok(Operand::Vector(list.split(',').map(|t| operand(t, names)).collect::<Result<_>>()?));
    }
    if let Some(address) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
        if let Some((base, at)) = address.split_once(',') {
            let Operand::Vector(at) = operand(at, names)? else { return Err("a tensor's coordinates".into()) };
            return Ok(Operand::Tensor(Box::new(operand(base, names)?), at));
        }
        let (base, offset) = match address.split_once('+') {
            Some((base, offset)) => (base, offset.trim().parse().map_err(|_| format!("offset {offset}"))?),
            None => (address, 0),
        };
        return Ok(Operand::Mem(Box::new(operand(base, names)?), offset));
    }
    if let Some(&register) = names.regs.get(text) {
        return Ok(Operand::Reg(register));
    }
    if let Some(&address) = names.params.get(text).or(names.shared.get(text)) {
        return Ok(Operand::Imm(address));
    }
    let special = match text {
        "_" => return Ok(Operand::Nothing),
        "%tid.x" => Some(Special::Tid),
        "%ntid.x" => Some(Special::Ntid),
        "%ctaid.x" => Some(Special::Ctaid),
        "%nctaid.x" => Some(Special::Nctaid),
        "%ctaid.y" => Some(Special::CtaidY),
        "%nctaid.y" => Some(Special::NctaidY),
        "%laneid" => Some(Special::LaneId),
        "%tid.y" | "%tid.z" | "%ctaid.z" => Some(Special::Zero),
        "%ntid.y" | "%ntid.z" | "%nctaid.z" => Some(Special::One),
        _ => None,
    };
    if let Some(special) = special {
        return Ok(Operand::Special(special));
    }
    let hex = |digits: &str| u64::from_str_radix(digits, 16).map_err(|_| format!("number {text}"));
    if let Some(digits) = text.strip_prefix("0f").or(text.strip_prefix("0F")) {
        return hex(digits).map(Operand::Imm);
    }
    if let Some(digits) = text.strip_prefix("0x") {
        return hex(digits.trim_end_matches('U')).map(Operand::Imm);
    }
    text.parse::<i64>().map(|v| Operand::Imm(v as u64)).map_err(|_| format!("operand {text:?}"))
}

fn instruction(text: &str, names: &Names, labels: &HashMap<String, usize>) -> Result<Ins> {
    let (guard, rest) = match text.strip_prefix('@') {
        None => (None, text),
        Some(guarded) => {
            let (pred, rest) = guarded.split_once(char::is_whitespace).ok_or("a guard alone")?;
            let (pred, wanted) = pred.strip_prefix('!').map_or((pred, true), |pred| (pred, false));
            (Some((*names.regs.get(pred).ok_or("guard")?, wanted)), rest.trim())
        }
    };
    let (opcode, args) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let parts: Vec<&str> = opcode.split('.').collect();
    let (stem, mods) = (parts[0], &parts[1..]);
    let has = |m: &str| mods.contains(&m);
    if stem == "bra" {
        let target = *labels.get(args.trim()).ok_or("a branch to nowhere")?;
        return Ok(Ins { op: Op::Branch(target), guard, to: vec![], from: vec![], text: text.to_owned() });
    }
    let types: Vec<Ty> = mods.iter().filter_map(|m| Ty::parse(m)).collect();
    let operands: Vec<Operand> = split_operands(args).iter().map(|a| operand(a, names)).collect::<Result<_>>()?;
    let ty = types.first().copied();
    let need = || ty.ok_or_else(|| "an instruction without a type".to_owned());
    let space = || match mods.iter().find(|m| ["global", "shared", "param"].contains(m)) {
        Some(&"global") => Ok(Space::Global),
        Some(&"shared") => Ok(Space::Shared),
        Some(&"param") => Ok(Space::Param),
        _ => Err("generic addresses are not supported".to_owned()),
    };
    let (op, outputs) = match stem {
        "ret" | "exit" => (Op::Return, 0),
        "mov" if matches!(operands.first(), Some(Operand::Vector(v)) if !v.is_empty()) => {
            let Some(Operand::Vector(v)) = operands.first() else { return Err("vector".into()) };
            (Op::Unpack(need()?.bits / v.len() as u32), 1)
        }
        "mov" if matches!(operands.get(1), Some(Operand::Vector(v)) if !v.is_empty()) => {
            let Some(Operand::Vector(v)) = operands.get(1) else { return Err("vector".into()) };
            (Op::Pack(need()?.bits / v.len() as u32), 1)
        }
        "bfi" => (Op::BitFieldInsert, 1),
        "ld" => {
            let ty = need()?;
            (Op::Load { space: space()?, bytes: ty.bits as usize / 8, signed: ty.kind == Kind::Signed }, 1)
        }
        "st" => (Op::Store { space: space()?, bytes: need()?.bits as usize / 8 }, 0),
        "atom" if has("or") && has("b32") && has("global") => (Op::Atomic { max: false }, 1),
        "atom" if has("max") && has("u32") && has("global") => (Op::Atomic { max: true }, 1),
        "bar" | "barrier" if has("sync") && !has("warp") => match operands[..] {
            [Operand::Imm(id)] => (Op::Barrier { id, threads: None }, 0),
            [Operand::Imm(id), Operand::Imm(n)] => (Op::Barrier { id, threads: Some(n) }, 0),
            _ => return Err("a barrier of another kind".into()),
        },
        "bar" if has("warp") => (Op::WarpSync, 0),
        "vote" if has("ballot") => (Op::Ballot, 1),
        "shfl" => {
            let mode = match mods.get(1) {
                Some(&"bfly") => Shuffle::Xor,
                Some(&"up") => Shuffle::Up,
                Some(&"down") => Shuffle::Down,
                Some(&"idx") => Shuffle::Index,
                _ => return Err("shuffle".into()),
            };
            (Op::Shuffle(mode), 2)
        }
        "cp" if has("bulk") => {
            let wanted = "async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes";
            if mods.join(".") != wanted {
                return Err("only tiles of two dimensions".into());
            }
            (Op::TensorCopy, 1)
        }
        "cp" if has("commit_group") => (Op::CopyCommit, 0),
        "cp" if has("wait_group") => (Op::CopyWait, 0),
        "cp" if has("cg") && has("shared") && has("global") => (Op::CopyAsync, 1),
        "ldmatrix" if has("m8n8") && has("b16") => (Op::LoadMatrix { transposed: has("trans") }, 1),
        "mma" if has("m16n8k16") && has("row") && has("col") => (Op::Mma { bf16: has("bf16") }, 1),
        "mbarrier" if has("init") => (Op::MbarrierInit, 1),
        "mbarrier" if has("arrive") => (Op::MbarrierArrive { expect: has("expect_tx") }, 1),
        "mbarrier" if has("try_wait") && has("parity") => (Op::MbarrierTry, 1),
        "wgmma" if has("mma_async") => {
            let shape = mods.iter().find_map(|m| m.strip_prefix("m64n")?.strip_suffix("k16"));
            let n = shape.and_then(|n| n.parse().ok()).ok_or("shape of wgmma")?;
            (Op::Wgmma { bf16: has("bf16"), n }, 1)
        }
        "wgmma" if has("commit_group") => (Op::WgmmaCommit, 0),
        "wgmma" if has("wait_group") => (Op::WgmmaWait, 0),
        "fence" | "membar" | "setmaxnreg" | "wgmma" | "griddepcontrol" | "prefetch" => (Op::Nothing, 0),
        _ => (Op::Alu(alu(stem, mods, &types).ok_or("not supported")?), 1),
    };
    let (to, from) = operands.split_at(outputs.min(operands.len()));
    let (mut to, mut from) = (to.to_vec(), from.to_vec());
    // Negative numbers are written as such: cut them to the width that registers have.
    if let (Op::Alu(_), Some(Ty { bits: bits @ (16 | 32), .. }), false) = (&op, ty, has("wide")) {
        for o in &mut from {
            if let Operand::Imm(v) = o {
                *v &= (1 << bits) - 1;
            }
        }
    }
    // A shuffle may leave out its predicate.
    if matches!(op, Op::Shuffle(_)) && from.len() < 4 {
        from.insert(0, to.remove(1));
    }
    Ok(Ins { op, guard, to, from, text: text.chars().take(100).collect() })
}
