//! What a pickle held: dicts, lists, tuples, plain values, tensors, as a table that is walked without recursion.

use super::pickle::{Global, Storage, TensorRef};
use crate::error::{Error, Result};
use std::fmt::Write;
use std::sync::Arc;

/// The number of a value in its table.
pub(crate) type Id = u32;

/// Values may nest this deep. Python's own pickler stops at its recursion limit, 1000 frames.
const MAX_DEPTH: usize = 1000;
/// A walk over all values, counting one as often as it is referred to, may visit this many ...
const MAX_VISITS: usize = 1 << 22;
/// ... tensors may take this many bytes with their paths and names, in all the copies that a reader makes of these ...
const MAX_TENSOR_BYTES: usize = 128 << 20;
/// ... and plain values and keys, written down with the paths to them, this many.
const MAX_TEXT_BYTES: usize = 64 << 20;
/// What an entry in a list of tensors takes, a step of its path, and a byte of its name.
const TENSOR_BYTES: usize = 320;
const STEP_BYTES: usize = 64;
const NAME_COPIES: usize = 4;
/// What a step of a path takes beside the text of its key, written down.
const STEP_TEXT: usize = 8;
/// The keys on the way to a value may have this many bytes together.
const MAX_PATH_BYTES: usize = 1 << 20;
/// A key that is no string or integer is spelled up to about this many bytes.
const MAX_KEY_BYTES: usize = 1 << 10;
/// What an allocation takes beside what is asked for.
pub(crate) const ALLOCATION_BYTES: usize = 32;

/// One value; containers hold the numbers of others.
#[derive(Debug)]
pub(crate) enum Node {
    None,
    Bool(bool),
    Int(i64),
    /// An integer beyond 64 bits, little-endian two's complement, without needless bytes.
    Big(Arc<[u8]>),
    Float(f64),
    Str(Arc<str>),
    Bytes(Arc<[u8]>),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// Keys and values in their order; whether it is an OrderedDict or Counter, which may have attributes.
    Dict(Vec<(Id, Id)>, bool),
    /// Elements; whether it is frozen.
    Set(Vec<Id>, bool),
    Global(Global),
    Storage(Storage),
    Tensor(Arc<TensorRef>),
    /// A value that this crate has no use for, described.
    Opaque(String),
}

impl Node {
    /// The bytes that it holds beside its place in the table, but for those of strings.
    pub(crate) fn held_bytes(&self) -> usize {
        let own = match self {
            Node::Tuple(ids) | Node::List(ids) | Node::Set(ids, _) => size_of_val(ids.as_slice()),
            Node::Dict(entries, _) => size_of_val(entries.as_slice()),
            Node::Tensor(tensor) => {
                let sizes = size_of_val(tensor.shape.as_slice()).saturating_mul(2);
                sizes.saturating_add(size_of::<TensorRef>()).saturating_add(ALLOCATION_BYTES.saturating_mul(2))
            }
            Node::Opaque(text) => text.len(),
            Node::Big(_) | Node::Str(_) | Node::Bytes(_) => 0,
            _ => return 0,
        };
        own.saturating_add(ALLOCATION_BYTES)
    }
}

/// All values of a pickle. The first are the constants.
#[derive(Debug)]
pub(crate) struct Nodes(Vec<Node>);

impl Nodes {
    pub(crate) const NONE: Id = 0;
    pub(crate) const FALSE: Id = 1;
    pub(crate) const TRUE: Id = 2;
    pub(crate) const EMPTY_TUPLE: Id = 3;
    const INTS: Id = 4;

    pub(crate) fn new() -> Self {
        let mut nodes = vec![Node::None, Node::Bool(false), Node::Bool(true), Node::Tuple(Vec::new())];
        nodes.extend((0..256).map(Node::Int));
        Nodes(nodes)
    }

    pub(crate) fn small_int(value: i64) -> Option<Id> {
        u8::try_from(value).ok().map(|n| Self::INTS.saturating_add(n.into()))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn ids(&self) -> std::ops::Range<Id> {
        0..Id::try_from(self.0.len()).unwrap_or(Id::MAX)
    }

    /// The caller keeps the table far below 2^32 values.
    pub(crate) fn add(&mut self, node: Node) -> Id {
        let id = Id::try_from(self.0.len()).unwrap_or(Id::MAX);
        self.0.push(node);
        id
    }

    pub(crate) fn get(&self, id: Id) -> Option<&Node> {
        self.0.get(usize::try_from(id).ok()?)
    }

    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut Node> {
        self.0.get_mut(usize::try_from(id).ok()?)
    }

    /// What a message calls the value.
    pub(crate) fn kind(&self, id: Id) -> &'static str {
        match self.get(id) {
            None => "nothing",
            Some(Node::None) => "None",
            Some(Node::Bool(_)) => "a bool",
            Some(Node::Int(_) | Node::Big(_)) => "an int",
            Some(Node::Float(_)) => "a float",
            Some(Node::Str(_)) => "a str",
            Some(Node::Bytes(_)) => "bytes",
            Some(Node::Tuple(_)) => "a tuple",
            Some(Node::List(_)) => "a list",
            Some(Node::Dict(..)) => "a dict",
            Some(Node::Set(..)) => "a set",
            Some(Node::Global(global)) => global.name(),
            Some(Node::Storage(_)) => "a storage",
            Some(Node::Tensor(_)) => "a tensor",
            Some(Node::Opaque(_)) => "an object",
        }
    }

    fn value(&self, id: Id) -> Value<'_> {
        match self.get(id) {
            None | Some(Node::None) => Value::None,
            Some(Node::Bool(b)) => Value::Bool(*b),
            Some(Node::Int(n)) => Value::Int(*n),
            Some(Node::Big(bytes)) => Value::Big(BigInt(bytes)),
            Some(Node::Float(f)) => Value::Float(*f),
            Some(Node::Str(text)) => Value::Str(text),
            Some(Node::Bytes(bytes)) => Value::Bytes(bytes),
            Some(Node::Tuple(ids)) => Value::Tuple(Items { nodes: self, ids }),
            Some(Node::List(ids)) => Value::List(Items { nodes: self, ids }),
            Some(Node::Dict(entries, _)) => Value::Dict(Entries { nodes: self, entries }),
            Some(Node::Set(ids, _)) => Value::Set(Items { nodes: self, ids }),
            Some(Node::Global(global)) => Value::Opaque(global.name()),
            Some(Node::Storage(_)) => Value::Opaque("a storage"),
            Some(Node::Tensor(tensor)) => Value::Tensor(tensor),
            Some(Node::Opaque(what)) => Value::Opaque(what),
        }
    }

    fn key(&self, id: Id) -> PathPart {
        match self.get(id) {
            Some(Node::Str(text)) => PathPart::Key(text.clone()),
            Some(Node::Int(n)) => PathPart::Index(*n),
            _ => {
                let mut text = String::new();
                self.spell(id, 0, &mut text);
                PathPart::Key(text.into())
            }
        }
    }

    /// Appends a key that is neither string nor integer, as Python's `str` shows it, more or less.
    fn spell(&self, id: Id, depth: usize, out: &mut String) {
        // Writing to a string cannot fail.
        let _ = match self.get(id) {
            Some(Node::Tuple(items)) if depth < 3 => {
                out.push('(');
                for (index, &item) in items.iter().take(16).enumerate() {
                    if out.len() > MAX_KEY_BYTES {
                        break;
                    }
                    out.push_str(if index == 0 { "" } else { ", " });
                    self.spell(item, depth.saturating_add(1), out);
                }
                out.write_str(if items.len() == 1 { ",)" } else { ")" })
            }
            Some(Node::Str(text)) => write!(out, "'{}'", short(text)),
            Some(Node::None) => out.write_str("None"),
            Some(Node::Bool(true)) => out.write_str("True"),
            Some(Node::Bool(false)) => out.write_str("False"),
            Some(Node::Int(n)) => write!(out, "{n}"),
            Some(Node::Big(bytes)) if bytes.len() <= 32 => write!(out, "{}", BigInt(bytes)),
            Some(Node::Float(f)) => write!(out, "{f:?}"),
            Some(Node::Bytes(bytes)) => {
                write!(out, "b'{}'", bytes.get(..256).unwrap_or(bytes).escape_ascii())
            }
            Some(Node::Opaque(what)) => out.write_str(what),
            Some(Node::Global(global)) => out.write_str(global.name()),
            _ => out.write_str(self.kind(id)),
        };
    }
}

/// The first 256 characters, for a message.
pub(super) fn short(text: &str) -> &str {
    text.char_indices().nth(256).and_then(|(end, _)| text.get(..end)).unwrap_or(text)
}

/// One step of the way to a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PathPart {
    /// A key of a dict. Keys that are neither strings nor integers are spelled as in Python.
    Key(Arc<str>),
    /// A position in a list or tuple, or an integer key of a dict.
    Index(i64),
}

impl std::fmt::Display for PathPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            PathPart::Key(key) => f.write_str(key),
            PathPart::Index(n) => write!(f, "{n}"),
        }
    }
}

impl From<&str> for PathPart {
    fn from(key: &str) -> Self {
        PathPart::Key(key.into())
    }
}

/// The steps joined by dots: `model.W_enc`.
pub fn dotted(path: &[PathPart]) -> String {
    let parts: Vec<String> = path.iter().map(ToString::to_string).collect();
    parts.join(".")
}

/// A value read from a checkpoint. Cheap to copy: containers are looked into where they are.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// `None`
    None,
    /// `True`, `False`
    Bool(bool),
    /// An integer of 64 bits.
    Int(i64),
    /// An integer beyond 64 bits.
    Big(BigInt<'a>),
    /// A float.
    Float(f64),
    /// A string.
    Str(&'a str),
    /// Bytes.
    Bytes(&'a [u8]),
    /// A list.
    List(Items<'a>),
    /// A tuple, also a `torch.Size`.
    Tuple(Items<'a>),
    /// A dict, OrderedDict or Counter, without the attributes.
    Dict(Entries<'a>),
    /// A set or frozenset, in the order of the file.
    Set(Items<'a>),
    /// A tensor; its elements are still in the file.
    Tensor(&'a Arc<TensorRef>),
    /// Something else: a dtype, a device, a complex number, a bytearray, a storage. The text describes it.
    Opaque(&'a str),
}

impl<'a> Value<'a> {
    /// The value under this key, if this is a dict that has it.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.entries().find(|(k, _)| matches!(k, PathPart::Key(k) if &**k == key)).map(|(_, value)| value)
    }

    /// Keys and values, if this is a dict; otherwise nothing.
    pub fn entries(&self) -> impl Iterator<Item = (PathPart, Value<'a>)> + 'a {
        let (nodes, entries) = match *self {
            Value::Dict(entries) => (Some(entries.nodes), entries.entries),
            _ => (None, &[][..]),
        };
        entries.iter().filter_map(move |&(key, value)| nodes.map(|n| (n.key(key), n.value(value))))
    }

    /// The elements, if this is a list, tuple or set; otherwise nothing.
    pub fn items(&self) -> impl Iterator<Item = Value<'a>> + 'a {
        let (nodes, ids) = match *self {
            Value::List(items) | Value::Tuple(items) | Value::Set(items) => (Some(items.nodes), items.ids),
            _ => (None, &[][..]),
        };
        ids.iter().filter_map(move |&id| nodes.map(|n| n.value(id)))
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    /// The integer, if it is one of 64 bits.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Value::Int(n) => Some(n),
            _ => None,
        }
    }

    /// The number, if it is a float or an integer of 64 bits.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Float(f) => Some(f),
            Value::Int(n) => Some(n as f64),
            _ => None,
        }
    }

    /// The bool, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(b) => Some(b),
            _ => None,
        }
    }

    /// The tensor, if it is one.
    pub fn as_tensor(&self) -> Option<&'a Arc<TensorRef>> {
        match *self {
            Value::Tensor(tensor) => Some(tensor),
            _ => None,
        }
    }
}

/// The elements of a list, tuple or set, see [`Value::items`].
#[derive(Clone, Copy)]
pub struct Items<'a> {
    nodes: &'a Nodes,
    ids: &'a [Id],
}

impl Items<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

impl std::fmt::Debug for Items<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{} items]", self.len())
    }
}

/// The entries of a dict, see [`Value::entries`].
#[derive(Clone, Copy)]
pub struct Entries<'a> {
    nodes: &'a Nodes,
    entries: &'a [(Id, Id)],
}

impl Entries<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl std::fmt::Debug for Entries<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{{{} entries}}", self.len())
    }
}

/// An integer beyond 64 bits. `Display` writes it in decimal, or in hexadecimal where it has more than
/// [`BigInt::MAX_DECIMAL_BYTES`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BigInt<'a>(&'a [u8]);

impl<'a> BigInt<'a> {
    /// Writing decimal digits takes quadratic time; Python, too, refuses beyond 4300 digits.
    pub const MAX_DECIMAL_BYTES: usize = 1784;

    /// Little-endian two's complement, as short as can be.
    pub fn le_bytes(&self) -> &'a [u8] {
        self.0
    }

    /// Whether it is below 0.
    pub fn is_negative(&self) -> bool {
        self.0.last().is_some_and(|&b| b >= 0x80)
    }

    /// The bytes of the absolute value, little-endian.
    fn magnitude(&self) -> Vec<u8> {
        let mut carry = true;
        let negate = |&b: &u8| {
            let (b, overflow) = (!b).overflowing_add(carry.into());
            carry = overflow;
            b
        };
        match self.is_negative() {
            true => self.0.iter().map(negate).collect(),
            false => self.0.to_vec(),
        }
    }
}

impl std::fmt::Display for BigInt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut magnitude = self.magnitude();
        let sign = if self.is_negative() { "-" } else { "" };
        if magnitude.len() > Self::MAX_DECIMAL_BYTES {
            write!(f, "{sign}0x")?;
            return magnitude.iter().rev().try_for_each(|b| write!(f, "{b:02x}"));
        }
        // Division by 10^9, from the highest byte down; the remainders are the digits.
        let mut digits: Vec<u32> = Vec::new();
        while magnitude.iter().any(|&b| b != 0) {
            let mut rest = 0u64;
            for b in magnitude.iter_mut().rev() {
                let n = rest << 8 | u64::from(*b);
                *b = u8::try_from(n / 1_000_000_000).unwrap_or_default();
                rest = n % 1_000_000_000;
            }
            digits.push(u32::try_from(rest).unwrap_or_default());
            while magnitude.pop_if(|b| *b == 0).is_some() {}
        }
        write!(f, "{sign}{}", digits.pop().unwrap_or_default())?;
        digits.iter().rev().try_for_each(|d| write!(f, "{d:09}"))
    }
}

/// A pickle's values and its root.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Nodes,
    root: Id,
}

impl Tree {
    pub(crate) fn new(nodes: Nodes, root: Id) -> Self {
        Tree { nodes, root }
    }

    pub(crate) fn root(&self) -> Value<'_> {
        self.nodes.value(self.root)
    }

    /// Calls `visit` with the path and value of every leaf: whatever is no dict, list or tuple that holds something. A set is a
    /// leaf: what lies in it has no path, and is looked at for the limits alone.
    ///
    /// # Errors
    /// Too deep, too many, a tensor in a set (which has no path), and the errors of `visit`.
    pub(crate) fn walk<'a>(&'a self, mut visit: impl FnMut(&[PathPart], Value<'a>) -> Result<()>) -> Result<()> {
        struct Frame {
            id: Id,
            next: usize,
            in_set: bool,
            /// Steps of the path up to here, and bytes of their keys.
            cost: (usize, usize),
        }
        let mut path: Vec<PathPart> = Vec::new();
        let mut frames: Vec<Frame> = Vec::new();
        let (mut visits, mut tensor_bytes, mut plain_bytes) = (0usize, 0usize, 0usize);
        // A value to look at, and whether it lies in a set.
        let mut next = Some((self.root, false));
        loop {
            if let Some((id, in_set)) = next.take() {
                visits = visits.saturating_add(1);
                if visits > MAX_VISITS {
                    return Err(Error::format(format!(
                        "too many values: a walk would visit more than the limit of {MAX_VISITS} (a value counts for each reference to it)"
                    )));
                }
                let (steps, text) = frames.last().map_or((0, 0), |f| f.cost);
                let key_bytes = match path.last() {
                    Some(PathPart::Key(key)) => key.len(),
                    _ => 0,
                };
                let (steps, text) = (steps.saturating_add(1), text.saturating_add(key_bytes));
                if text > MAX_PATH_BYTES {
                    return Err(Error::format(format!(
                        "the keys on the way to a value have {text} bytes; the limit is {MAX_PATH_BYTES}"
                    )));
                }
                let written = steps.saturating_mul(STEP_TEXT).saturating_add(text);
                match self.nodes.get(id) {
                    Some(node @ (Node::Tuple(_) | Node::List(_) | Node::Dict(..) | Node::Set(..))) => {
                        if frames.len() >= MAX_DEPTH {
                            return Err(Error::format(format!("values nest deeper than the limit of {MAX_DEPTH}")));
                        }
                        let (is_set, is_empty) = match node {
                            Node::Set(..) => (true, false),
                            Node::Tuple(ids) | Node::List(ids) => (false, ids.is_empty()),
                            Node::Dict(entries, _) => (false, entries.is_empty()),
                            _ => (false, false),
                        };
                        let is_leaf = (is_set || is_empty) && !in_set;
                        // Of others, the key alone: it was spelled.
                        let own = if is_leaf { written } else { key_bytes };
                        plain_bytes = plain_bytes.saturating_add(own);
                        spend(plain_bytes, MAX_TEXT_BYTES)?;
                        if is_leaf {
                            visit(&path, self.nodes.value(id))?;
                        }
                        frames.push(Frame { id, next: 0, in_set: in_set || is_set, cost: (steps, text) });
                        continue;
                    }
                    Some(Node::Tensor(_)) if in_set => {
                        return Err(Error::unsupported("a tensor in a set, where it has no place to be found by"));
                    }
                    Some(Node::Tensor(tensor)) => {
                        let sizes = size_of_val(tensor.shape.as_slice()).saturating_mul(2);
                        let way = steps.saturating_mul(STEP_BYTES).saturating_add(text.saturating_mul(NAME_COPIES));
                        let own = TENSOR_BYTES.saturating_add(sizes).saturating_add(way);
                        tensor_bytes = tensor_bytes.saturating_add(own);
                        spend(tensor_bytes, MAX_TENSOR_BYTES)?;
                        visit(&path, Value::Tensor(tensor))?;
                    }
                    node => {
                        let own = match node {
                            Some(Node::Str(text)) => text.len(),
                            // Decimal digits take quadratic time.
                            Some(Node::Big(bytes)) => bytes.len().saturating_mul(bytes.len()),
                            Some(Node::Opaque(what)) => what.len(),
                            _ => 0,
                        };
                        plain_bytes = plain_bytes.saturating_add(written).saturating_add(own);
                        spend(plain_bytes, MAX_TEXT_BYTES)?;
                        if !in_set {
                            visit(&path, self.nodes.value(id))?;
                        }
                    }
                }
                path.pop();
            }
            let Some(frame) = frames.last_mut() else { return Ok(()) };
            let step = match self.nodes.get(frame.id) {
                Some(Node::Tuple(ids) | Node::List(ids) | Node::Set(ids, _)) => {
                    let part = PathPart::Index(i64::try_from(frame.next).unwrap_or(i64::MAX));
                    ids.get(frame.next).map(|&id| (part, id))
                }
                Some(Node::Dict(entries, _)) => entries.get(frame.next).map(|&(key, id)| (self.nodes.key(key), id)),
                _ => None,
            };
            match step {
                Some((part, id)) => {
                    frame.next = frame.next.saturating_add(1);
                    path.push(part);
                    next = Some((id, frame.in_set));
                }
                None => {
                    frames.pop();
                    path.pop();
                }
            }
        }
    }
}

fn spend(bytes: usize, limit: usize) -> Result<()> {
    match bytes > limit {
        true => Err(Error::format(format!(
            "too many values: with the paths to them they take more than the limit of {limit} bytes (a value counts for \
             each reference to it)"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn big_integers_in_decimal() {
        for (bytes, text) in [
            (&[0, 0, 0, 0, 0, 0, 0, 0, 1][..], "18446744073709551616"),
            (&[255, 255, 255, 255, 255, 255, 255, 127, 255], "-9223372036854775809"),
            (&[0, 0, 0, 0, 0, 0, 0, 128, 0], "9223372036854775808"),
        ] {
            assert_eq!(BigInt(bytes).to_string(), text);
        }
        // 2^4096 has 1234 digits and begins with 10443888814131525066.
        let mut bytes = vec![0; 513];
        bytes[512] = 1;
        let text = BigInt(&bytes).to_string();
        assert_eq!((text.len(), &text[..20]), (1234, "10443888814131525066"));
        // -2^64: all magnitude bytes carry over.
        assert_eq!(BigInt(&[0, 0, 0, 0, 0, 0, 0, 0, 255]).to_string(), "-18446744073709551616");
        assert!(BigInt(&[1; 2000]).to_string().starts_with("0x0101"));
    }
}
