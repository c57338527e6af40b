//! The pickle reader: a small machine for what `torch.save` writes, which calls nothing.
//!
//! A pickle is a program for a stack machine, and Python's own machine can be made to call anything. This one knows the
//! opcodes that CPython's pickler writes for protocols 2 to 5 and a fixed list of globals; each global stands for a rule in
//! [`Machine::call`], not for a function. Whatever is not on the lists is refused, whether or not it is ever used.
//!
//! Values live in one table and refer to one another by number ([`Id`]). So a memoized list is seen with what it was filled
//! with later, a value that is referred to a million times is there once, values that contain themselves need no care,
//! and nothing here recurses, also not when it is dropped.

use super::value::{ALLOCATION_BYTES, Id, Node, Nodes, short};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::raw::Bytes;
use crate::tensor::{MAX_DIMS, element_count};
use std::collections::HashMap;
use std::sync::Arc;

/// More values than this in one pickle are refused, as is more on the stack, under a MARK or in the memo at once.
const MAX_NODES: usize = 1 << 21;
/// What values hold beside their places in the table: references, sizes of tensors, descriptions, copies that calls make, and
/// what an allocation costs. The bytes of strings do not count: they are in the pickle.
const MAX_HELD_BYTES: usize = 48 << 20;
/// So many keys may differ in the dicts of one pickle.
const MAX_KEYS: usize = 1 << 20;
/// A device's name, such as `cuda:0`, may have this many bytes.
const MAX_DEVICE_BYTES: usize = 64;
/// A view whose elements take more than this, and more than `EXPANSION` times its storage, is refused.
const EXPANDED_BYTES: u64 = 64 << 20;
const EXPANSION: u64 = 16;
/// Floats from here on are integers beyond 64 bits.
const TWO_63: f64 = 9_223_372_036_854_775_808.0;
/// Tuples as keys of dicts may nest this deep.
const MAX_KEY_DEPTH: usize = 32;

/// Where a tensor's elements lie: a view of one record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorRef {
    /// The elements' type.
    pub dtype: Dtype,
    /// The sizes.
    pub shape: Vec<usize>,
    /// The distance of neighbours in each dimension, in elements of the storage.
    pub strides: Vec<usize>,
    /// The first element's position in the storage, in elements.
    pub offset: usize,
    /// The number of elements, the product of the sizes.
    pub elements: usize,
    /// The index of the storage's record in the archive.
    pub(crate) record: usize,
    /// The length of the storage's record.
    pub(crate) storage_bytes: u64,
}

impl TensorRef {
    /// The bytes of its elements.
    pub(crate) fn bytes(&self) -> u64 {
        (self.elements as u64).saturating_mul(self.dtype.size_bytes() as u64)
    }

    /// One more than the last position that the view reads, counted from its first; 0 if it has no elements.
    pub(crate) fn span(&self) -> usize {
        if self.elements == 0 {
            return 0;
        }
        let dims = self.shape.iter().zip(&self.strides);
        dims.fold(1usize, |n, (&size, &stride)| n.saturating_add(size.saturating_sub(1).saturating_mul(stride)))
    }
}

/// A storage as a persistent id names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    record: usize,
    /// None for `UntypedStorage`.
    dtype: Option<Dtype>,
    bytes: u64,
}

/// The names that a pickle may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Global {
    OrderedDict,
    Counter,
    Size,
    Device,
    /// A dtype, by its name; what this crate carries, it knows.
    Dtype(&'static str),
    /// A storage class, by its name, and its dtype where this crate carries it.
    Storage(&'static str, Option<Dtype>),
    UntypedStorage,
    TypedStorage,
    Tensor,
    Parameter,
    Buffer,
    /// `_rebuild_tensor`, `_v2`, `_v3`: version 1, 2, 3.
    Rebuild(u8),
    RebuildParameter,
    RebuildParameterWithState,
    RebuildFromType,
    Encode,
    Set,
    Bytearray,
    Complex,
}

/// Every dtype that PyTorch names. Some of them are carried, see [`carried`].
const DTYPES: [&str; 46] = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "uint16",
    "uint32",
    "uint64",
    "complex32",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "qint8",
    "qint32",
    "quint8",
    "quint4x2",
    "quint2x4",
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bits16",
    "int1",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "uint1",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
];

const STORAGES: [(&str, Option<Dtype>); 17] = [
    ("DoubleStorage", Some(Dtype::F64)),
    ("FloatStorage", Some(Dtype::F32)),
    ("HalfStorage", Some(Dtype::F16)),
    ("BFloat16Storage", Some(Dtype::BF16)),
    ("LongStorage", Some(Dtype::I64)),
    ("IntStorage", Some(Dtype::I32)),
    ("ShortStorage", Some(Dtype::I16)),
    ("CharStorage", Some(Dtype::I8)),
    ("ByteStorage", Some(Dtype::U8)),
    ("BoolStorage", Some(Dtype::Bool)),
    ("ComplexFloatStorage", None),
    ("ComplexDoubleStorage", None),
    ("QInt8Storage", None),
    ("QInt32Storage", None),
    ("QUInt8Storage", None),
    ("QUInt4x2Storage", None),
    ("QUInt2x4Storage", None),
];

/// The dtype of this name, if this crate carries it.
fn carried(name: &str) -> Option<Dtype> {
    Dtype::ALL.into_iter().find(|d| d.name() == name)
}

impl Global {
    /// The one place where names are compared: whole and exactly.
    fn named(module: &str, name: &str) -> Result<Self> {
        let found = match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("collections", "Counter") => Some(Global::Counter),
            ("torch", "Size") => Some(Global::Size),
            ("torch", "device") => Some(Global::Device),
            ("torch", "Tensor") => Some(Global::Tensor),
            ("torch", _) => DTYPES
                .into_iter()
                .find(|&d| d == name)
                .map(Global::Dtype)
                .or_else(|| STORAGES.into_iter().find(|s| s.0 == name).map(|s| Global::Storage(s.0, s.1))),
            ("torch.storage", "UntypedStorage") => Some(Global::UntypedStorage),
            ("torch.storage", "TypedStorage") => Some(Global::TypedStorage),
            ("torch.nn.parameter", "Parameter") => Some(Global::Parameter),
            ("torch.nn.parameter", "Buffer") => Some(Global::Buffer),
            ("torch._utils", "_rebuild_tensor") => Some(Global::Rebuild(1)),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::Rebuild(2)),
            ("torch._utils", "_rebuild_tensor_v3") => Some(Global::Rebuild(3)),
            ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
            ("torch._utils", "_rebuild_parameter_with_state") => Some(Global::RebuildParameterWithState),
            ("torch._tensor", "_rebuild_from_type_v2") => Some(Global::RebuildFromType),
            ("_codecs", "encode") => Some(Global::Encode),
            ("builtins" | "__builtin__", "set") => Some(Global::Set),
            ("builtins" | "__builtin__", "bytearray") => Some(Global::Bytearray),
            ("builtins" | "__builtin__", "complex") => Some(Global::Complex),
            _ => None,
        };
        found.ok_or_else(|| {
            let hint = match name {
                _ if name.contains("sparse") => " (a sparse tensor)",
                "_rebuild_qtensor" => " (a quantized tensor)",
                _ if name.contains("meta_tensor") => " (a meta tensor, without data)",
                _ if module.starts_with("__torch__") => " (a TorchScript class)",
                _ => "",
            };
            let (module, name) = (short(module), short(name));
            Error::unsupported(format!("global '{module}.{name}'{hint} is not allowed; no state dict needs it"))
        })
    }

    /// The name that messages and opaque values show.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Global::OrderedDict => "collections.OrderedDict",
            Global::Counter => "collections.Counter",
            Global::Size => "torch.Size",
            Global::Device => "torch.device",
            Global::Dtype(name) | Global::Storage(name, _) => name,
            Global::UntypedStorage => "torch.storage.UntypedStorage",
            Global::TypedStorage => "torch.storage.TypedStorage",
            Global::Tensor => "torch.Tensor",
            Global::Parameter => "torch.nn.parameter.Parameter",
            Global::Buffer => "torch.nn.parameter.Buffer",
            Global::Rebuild(1) => "torch._utils._rebuild_tensor",
            Global::Rebuild(2) => "torch._utils._rebuild_tensor_v2",
            Global::Rebuild(_) => "torch._utils._rebuild_tensor_v3",
            Global::RebuildParameter => "torch._utils._rebuild_parameter",
            Global::RebuildParameterWithState => "torch._utils._rebuild_parameter_with_state",
            Global::RebuildFromType => "torch._tensor._rebuild_from_type_v2",
            Global::Encode => "_codecs.encode",
            Global::Set => "builtins.set",
            Global::Bytearray => "builtins.bytearray",
            Global::Complex => "builtins.complex",
        }
    }
}

/// What the machine asks the archive: the record of a storage's key, and its length.
pub(crate) type FindRecord<'a> = &'a dyn Fn(&str) -> Result<(usize, u64)>;

/// Runs the pickle. The result is the table of values and the root's number in it.
pub(crate) fn parse(pickle: Vec<u8>, find: FindRecord<'_>) -> Result<(Nodes, Id)> {
    let (mut nodes, root) = run(&pickle, find)?;
    drop(pickle);
    merge_keys(&mut nodes)?;
    Ok((nodes, root))
}

fn run(pickle: &[u8], find: FindRecord<'_>) -> Result<(Nodes, Id)> {
    let mut machine = Machine {
        bytes: Bytes::new(pickle),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Nodes::new(),
        storages: HashMap::new(),
        held: 0,
        find,
    };
    loop {
        let at = machine.bytes.at();
        match machine.step() {
            Ok(None) => {}
            Ok(Some(root)) => return Ok((machine.nodes, root)),
            Err(e) => return Err(e.at(format!("byte {at}"))),
        }
    }
}

struct Machine<'a> {
    bytes: Bytes<'a>,
    stack: Vec<Id>,
    /// Heights of the stack at each MARK; what lies below the last is out of reach.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    nodes: Nodes,
    /// The class under which each record was first named: PyTorch lets the first one rule, so others are refused.
    storages: HashMap<usize, Storage>,
    /// See [`MAX_HELD_BYTES`].
    held: usize,
    find: FindRecord<'a>,
}

impl<'a> Machine<'a> {
    /// Carries out one opcode. The result is the root's number after STOP.
    fn step(&mut self) -> Result<Option<Id>> {
        let [opcode] = self.operand("the pickle")?;
        if self.stack.len().max(self.marks.len()) > MAX_NODES {
            return Err(Error::format(format!("more than {MAX_NODES} values or MARKs on the stack")));
        }
        match opcode {
            0x80 => {
                let [version] = self.operand("PROTO")?;
                if !(2..=5).contains(&version) {
                    return Err(Error::unsupported(format!("pickle protocol {version}; protocols 2 to 5 are read")));
                }
            }
            // As in Python, the top of the stack is the result, whatever lies below.
            b'.' => {
                let root = self.pop()?;
                let left = self.bytes.left();
                if left > 0 {
                    return Err(Error::format(format!("STOP, and {left} bytes after it")));
                }
                return Ok(Some(root));
            }
            0x95 => {
                let frame = u64::from_le_bytes(self.operand("FRAME")?);
                let left = self.bytes.left();
                if frame > left as u64 {
                    return Err(Error::format(format!("FRAME of {frame} bytes, {left} are left")));
                }
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'N' => self.stack.push(Nodes::NONE),
            0x88 => self.stack.push(Nodes::TRUE),
            0x89 => self.stack.push(Nodes::FALSE),
            b'K' => {
                let [n] = self.operand("BININT1")?;
                self.push_int(n.into())?;
            }
            b'M' => {
                let n = u16::from_le_bytes(self.operand("BININT2")?);
                self.push_int(n.into())?;
            }
            b'J' => {
                let n = i32::from_le_bytes(self.operand("BININT")?);
                self.push_int(n.into())?;
            }
            0x8a => {
                let [n] = self.operand("LONG1")?;
                self.push_long("LONG1", n.into())?;
            }
            0x8b => {
                let n = i32::from_le_bytes(self.operand("LONG4")?);
                let n = u64::try_from(n).map_err(|_| Error::format(format!("LONG4 of {n} bytes")))?;
                self.push_long("LONG4", n)?;
            }
            b'G' => {
                let value = f64::from_be_bytes(self.operand("BINFLOAT")?);
                self.push(Node::Float(value))?;
            }
            // The short strings of Python 2's pickler; `torch.load` reads them as UTF-8.
            b'U' => self.push_str("SHORT_BINSTRING", 1)?,
            b'T' => self.push_str("BINSTRING", 4)?,
            0x8c => self.push_str("SHORT_BINUNICODE", 1)?,
            b'X' => self.push_str("BINUNICODE", 4)?,
            0x8d => self.push_str("BINUNICODE8", 8)?,
            b'C' => self.push_bytes("SHORT_BINBYTES", 1)?,
            b'B' => self.push_bytes("BINBYTES", 4)?,
            0x8e => self.push_bytes("BINBYTES8", 8)?,
            0x96 => {
                let bytes = self.sized("BYTEARRAY8", 8)?;
                self.push(Node::Opaque(format!("bytearray of {} bytes", bytes.len())))?;
            }
            b')' => self.stack.push(Nodes::EMPTY_TUPLE),
            0x85..=0x87 => {
                let mut items = vec![Nodes::NONE; usize::from(opcode.saturating_sub(0x84))];
                for item in items.iter_mut().rev() {
                    *item = self.pop()?;
                }
                self.push(Node::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items))?;
            }
            b']' => self.push(Node::List(Vec::new()))?,
            b'}' => self.push(Node::Dict(Vec::new(), false))?,
            0x8f => self.push(Node::Set(Vec::new(), false))?,
            0x91 => {
                let items = self.pop_mark()?;
                self.check_elements(&items)?;
                self.push(Node::Set(items, true))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append("APPEND", &[item])?;
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.append("APPENDS", &items)?;
            }
            0x90 => {
                let items = self.pop_mark()?;
                self.check_elements(&items)?;
                self.hold(references(&items))?;
                let top = self.top()?;
                match self.nodes.get_mut(top) {
                    Some(Node::Set(elements, false)) => elements.extend(items),
                    _ => return Err(self.unfit("ADDITEMS", "a set", top)),
                }
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items("SETITEM", &[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items("SETITEMS", &items)?;
            }
            b'q' => {
                let [n] = self.operand("BINPUT")?;
                self.remember(n.into())?;
            }
            b'r' => {
                let n = u32::from_le_bytes(self.operand("LONG_BINPUT")?);
                self.remember(n)?;
            }
            0x94 => {
                let n = u32::try_from(self.memo.len()).map_err(|_| Error::format("MEMOIZE: the memo is full"))?;
                self.remember(n)?;
            }
            b'h' => {
                let [n] = self.operand("BINGET")?;
                self.recall(n.into())?;
            }
            b'j' => {
                let n = u32::from_le_bytes(self.operand("LONG_BINGET")?);
                self.recall(n)?;
            }
            b'c' => {
                let mut line = || {
                    let line = self.bytes.line().ok_or_else(|| Error::format("GLOBAL: a line does not end"))?;
                    str::from_utf8(line).map_err(|_| Error::format("GLOBAL: a name is not UTF-8"))
                };
                let (module, name) = (line()?, line()?);
                let global = Global::named(module, name)?;
                self.push(Node::Global(global))?;
            }
            0x93 => {
                let name = self.pop()?;
                let module = self.pop()?;
                let (Some(Node::Str(module)), Some(Node::Str(name))) = (self.nodes.get(module), self.nodes.get(name))
                else {
                    return Err(Error::format("STACK_GLOBAL needs two strings"));
                };
                let global = Global::named(module, name)?;
                self.push(Node::Global(global))?;
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(Node::Storage(storage))?;
            }
            b'R' | 0x81 | 0x92 => {
                let keywords = if opcode == 0x92 { Some(self.pop()?) } else { None };
                let arguments = self.pop()?;
                let callable = self.pop()?;
                if let Some(keywords) = keywords
                    && !matches!(self.nodes.get(keywords), Some(Node::Dict(items, _)) if items.is_empty())
                {
                    return Err(Error::unsupported("NEWOBJ_EX with keyword arguments is not allowed"));
                }
                let Some(Node::Global(global)) = self.nodes.get(callable) else {
                    return Err(self.unfit("a call", "an allowed global", callable));
                };
                let Some(Node::Tuple(arguments)) = self.nodes.get(arguments) else {
                    return Err(self.unfit("a call", "a tuple of arguments", arguments));
                };
                let result = match opcode {
                    b'R' => self.call(*global, arguments),
                    _ => self.new_object(*global, arguments),
                };
                let result = result.map_err(|e| e.at(global.name()))?;
                // Of bytes that a call makes there is another copy than the pickle's.
                if let Node::Bytes(bytes) = &result {
                    self.hold(bytes.len())?;
                }
                self.push(result)?;
            }
            b'b' => {
                let state = self.pop()?;
                let object = self.top()?;
                let fits = matches!(self.nodes.get(state), Some(Node::Dict(..)));
                if !matches!(self.nodes.get(object), Some(Node::Dict(_, true))) {
                    return Err(self.unfit("BUILD", "an OrderedDict", object));
                }
                if !fits {
                    return Err(self.unfit("BUILD of an OrderedDict", "a dict of attributes", state));
                }
            }
            b'i' => {
                let mut name = || str::from_utf8(self.bytes.line().unwrap_or_default()).unwrap_or("?");
                let (module, name) = (short(name()), short(name()));
                return Err(Error::unsupported(format!("INST, a call of '{module}.{name}', is not allowed")));
            }
            _ => return Err(Error::unsupported(format!("opcode {opcode:02x}{} is not allowed", known_opcode(opcode)))),
        }
        Ok(None)
    }

    fn operand<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let left = self.bytes.left();
        self.bytes.array().ok_or_else(|| Error::format(format!("{what} is cut off: {N} bytes needed, {left} left")))
    }

    /// The bytes after a length of `width` bytes.
    fn sized(&mut self, what: &str, width: usize) -> Result<&'a [u8]> {
        let length = match width {
            1 => self.operand::<1>(what)?[0].into(),
            4 => u32::from_le_bytes(self.operand(what)?).into(),
            _ => u64::from_le_bytes(self.operand(what)?),
        };
        self.raw(what, length)
    }

    fn raw(&mut self, what: &str, length: u64) -> Result<&'a [u8]> {
        let left = self.bytes.left();
        let bytes = usize::try_from(length).ok().and_then(|n| self.bytes.take(n));
        bytes.ok_or_else(|| Error::format(format!("{what} claims {length} bytes, {left} are left")))
    }

    fn push(&mut self, node: Node) -> Result<()> {
        if self.nodes.len() >= MAX_NODES {
            return Err(Error::format(format!("more than {MAX_NODES} values")));
        }
        self.hold(node.held_bytes())?;
        let id = self.nodes.add(node);
        self.stack.push(id);
        Ok(())
    }

    fn hold(&mut self, bytes: usize) -> Result<()> {
        self.held = self.held.saturating_add(bytes);
        match self.held > MAX_HELD_BYTES {
            true => Err(Error::format(format!("containers, tensors and calls hold more than {MAX_HELD_BYTES} bytes"))),
            false => Ok(()),
        }
    }

    fn push_int(&mut self, value: i64) -> Result<()> {
        match Nodes::small_int(value) {
            Some(id) => {
                self.stack.push(id);
                Ok(())
            }
            None => self.push(Node::Int(value)),
        }
    }

    /// An integer in two's complement, of any width; those that fit 64 bits become `Int`.
    fn push_long(&mut self, what: &str, length: u64) -> Result<()> {
        let bytes = self.raw(what, length)?;
        let sign = bytes.last().is_some_and(|&b| b >= 0x80);
        let fill = if sign { 0xff } else { 0 };
        // The shortest form: no byte that only repeats the sign.
        let mut short = bytes;
        while let [rest @ .., last] = short
            && *last == fill
            && rest.last().is_none_or(|&b| (b >= 0x80) == sign)
            && !(rest.is_empty() && sign)
        {
            short = rest;
        }
        if short.len() <= 8 {
            let mut eight = [fill; 8];
            for (to, from) in eight.iter_mut().zip(short) {
                *to = *from;
            }
            self.push_int(i64::from_le_bytes(eight))
        } else {
            let short = Arc::from(short);
            self.push(Node::Big(short))
        }
    }

    fn push_str(&mut self, what: &str, width: usize) -> Result<()> {
        let bytes = self.sized(what, width)?;
        let text = str::from_utf8(bytes).map_err(|e| Error::format(format!("{what} is not UTF-8: {e}")))?;
        let text = Arc::from(text);
        self.push(Node::Str(text))
    }

    fn push_bytes(&mut self, what: &str, width: usize) -> Result<()> {
        let bytes = Arc::from(self.sized(what, width)?);
        self.push(Node::Bytes(bytes))
    }

    /// Whether anything lies above the last MARK.
    fn reachable(&self) -> Result<()> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => Ok(()),
            false => Err(Error::format(match self.marks.is_empty() {
                true => "a value is needed, and the stack is empty",
                false => "a value is needed, and none lies above the last MARK",
            })),
        }
    }

    fn pop(&mut self) -> Result<Id> {
        self.reachable()?;
        self.stack.pop().ok_or_else(|| Error::format("the stack is empty"))
    }

    fn top(&self) -> Result<Id> {
        self.reachable()?;
        self.stack.last().copied().ok_or_else(|| Error::format("the stack is empty"))
    }

    /// All values above the last MARK, and the MARK.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(|| Error::format("a MARK is needed, and there is none"))?;
        // The stack is never shorter than its marks: `pop` stops there.
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn remember(&mut self, n: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(n, top);
        match self.memo.len() > MAX_NODES {
            true => Err(Error::format(format!("more than {MAX_NODES} values are memoized"))),
            false => Ok(()),
        }
    }

    fn recall(&mut self, n: u32) -> Result<()> {
        let id = self.memo.get(&n).ok_or_else(|| Error::format(format!("number {n} was never memoized")))?;
        self.stack.push(*id);
        Ok(())
    }

    /// What `id` is, where `what` needed something else.
    fn unfit(&self, what: &str, needed: &str, id: Id) -> Error {
        Error::format(format!("{what} needs {needed}, not {}", self.nodes.kind(id)))
    }

    fn append(&mut self, what: &str, items: &[Id]) -> Result<()> {
        self.hold(references(items))?;
        let top = self.top()?;
        match self.nodes.get_mut(top) {
            Some(Node::List(list)) => {
                list.extend_from_slice(items);
                Ok(())
            }
            _ => Err(self.unfit(what, "a list", top)),
        }
    }

    /// `items` are keys and values by turns.
    fn set_items(&mut self, what: &str, items: &[Id]) -> Result<()> {
        let (pairs, odd) = items.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(Error::format(format!("{what}: {} keys and values, an odd number", items.len())));
        }
        let keys: Vec<Id> = pairs.iter().map(|&[key, _]| key).collect();
        self.check_elements(&keys)?;
        self.hold(references(items))?;
        let top = self.top()?;
        match self.nodes.get_mut(top) {
            Some(Node::Dict(entries, _)) => {
                entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
                Ok(())
            }
            _ => Err(self.unfit(what, "a dict", top)),
        }
    }

    /// Elements of sets and keys of dicts: what Python can hash, less tensors, whose hash is their address.
    fn check_elements(&self, ids: &[Id]) -> Result<()> {
        let bad = |id: &&Id| {
            let node = self.nodes.get(**id);
            let hashable = !matches!(node, Some(Node::List(_) | Node::Dict(..) | Node::Set(_, false)));
            !hashable || matches!(node, Some(Node::Tensor(_) | Node::Storage(_)))
        };
        match ids.iter().find(bad) {
            Some(&id) => {
                Err(Error::format(format!("{} cannot be a key of a dict or an element of a set", self.nodes.kind(id))))
            }
            None => Ok(()),
        }
    }

    /// `('storage', class, key, location, count)`
    fn storage(&mut self, id: Id) -> Result<Storage> {
        let parts = match self.nodes.get(id) {
            Some(Node::Tuple(items)) => items.as_slice(),
            _ => &[],
        };
        let parts: Vec<&Node> = parts.iter().filter_map(|&id| self.nodes.get(id)).collect();
        let [Node::Str(tag), Node::Global(class), Node::Str(key), _location, count] = parts.as_slice() else {
            return Err(Error::format("a persistent id is not ('storage', class, key, location, count)"));
        };
        if &**tag != "storage" {
            return Err(Error::format(format!("a persistent id begins with {:?}, not 'storage'", short(tag))));
        }
        let size = match class {
            Global::Storage(_, Some(dtype)) => dtype.size_bytes() as u64,
            Global::UntypedStorage => 1,
            Global::Storage(name, None) => {
                return Err(Error::unsupported(format!(
                    "a storage of type torch.{name}, which this crate does not carry"
                )));
            }
            _ => return Err(Error::format(format!("{} as the class of a storage", class.name()))),
        };
        let Node::Int(count) = count else {
            let what = format!("storage {:?}: its count of elements is not an integer of 64 bits", short(key));
            return Err(Error::format(what));
        };
        let bytes = u64::try_from(*count).ok().and_then(|n| n.checked_mul(size));
        let (record, record_bytes) = (self.find)(key)?;
        if bytes != Some(record_bytes) {
            return Err(Error::format(format!(
                "storage {key:?}: {count} elements of {size} bytes, and its record has {record_bytes} bytes"
            )));
        }
        let dtype = match class {
            Global::Storage(_, dtype) => *dtype,
            _ => None,
        };
        let storage = Storage { record, dtype, bytes: record_bytes };
        match self.storages.insert(record, storage) {
            Some(before) if before != storage => {
                Err(Error::format(format!("storage {key:?} is named under two classes")))
            }
            _ => Ok(storage),
        }
    }

    /// What the call makes. Every number and kind of arguments is checked; nothing is called.
    fn call(&self, global: Global, arguments: &[Id]) -> Result<Node> {
        let node = |id: Id| self.nodes.get(id).unwrap_or(&Node::None);
        let wrong = |needed: &str| {
            let kinds: Vec<&str> = arguments.iter().take(9).map(|&id| self.nodes.kind(id)).collect();
            let more = if arguments.len() > 9 { ", …" } else { "" };
            Error::format(format!("needs {needed} as arguments, got ({}{more})", kinds.join(", ")))
        };
        let nodes: Vec<&Node> = arguments.iter().take(9).map(|&id| node(id)).collect();
        match (global, nodes.as_slice()) {
            (Global::OrderedDict | Global::Counter, []) => Ok(Node::Dict(Vec::new(), true)),
            (Global::OrderedDict | Global::Counter, [Node::Dict(entries, _)]) => Ok(Node::Dict(entries.clone(), true)),
            // The pairs of Python 2's OrderedDict.
            (Global::OrderedDict, [Node::List(items)]) => {
                let pair = |&id: &Id| match node(id) {
                    Node::List(pair) | Node::Tuple(pair) => <[Id; 2]>::try_from(pair.as_slice()).ok(),
                    _ => None,
                };
                let pairs: Option<Vec<[Id; 2]>> = items.iter().map(pair).collect();
                let pairs = pairs.ok_or_else(|| wrong("a list of pairs"))?;
                self.check_elements(&pairs.iter().map(|&[key, _]| key).collect::<Vec<_>>())?;
                Ok(Node::Dict(pairs.into_iter().map(|[key, value]| (key, value)).collect(), true))
            }
            (Global::OrderedDict, _) => Err(wrong("nothing, a dict or a list of pairs")),
            (Global::Counter, _) => Err(wrong("nothing or a dict")),

            (Global::Size, []) => Ok(Node::Tuple(Vec::new())),
            (Global::Size, [Node::Tuple(sizes) | Node::List(sizes)])
                if sizes.iter().all(|&id| matches!(node(id), Node::Int(_))) =>
            {
                Ok(Node::Tuple(sizes.clone()))
            }
            (Global::Size, _) => Err(wrong("a tuple of integers")),
            (Global::Device, [Node::Str(kind), ..]) if kind.len() > MAX_DEVICE_BYTES => {
                Err(Error::format(format!("a device's name of {} bytes; the limit is {MAX_DEVICE_BYTES}", kind.len())))
            }
            (Global::Device, [Node::Str(kind)]) => Ok(Node::Opaque(format!("torch.device({kind:?})"))),
            (Global::Device, [Node::Str(kind), Node::Int(n)]) => {
                Ok(Node::Opaque(format!("torch.device(\"{kind}:{n}\")")))
            }
            (Global::Device, _) => Err(wrong("a string, or a string and an integer")),

            (Global::Rebuild(1), [Node::Storage(storage), offset, size, stride]) => {
                self.tensor(*storage, storage.dtype.unwrap_or(Dtype::U8), [offset, size, stride])
            }
            (Global::Rebuild(1), _) => Err(wrong("(storage, offset, size, stride)")),
            (
                Global::Rebuild(2),
                [Node::Storage(storage), offset, size, stride, Node::Bool(_), Node::Dict(..) | Node::None, flags @ ..],
            ) if flags.len() <= 1 => {
                self.check_flags(flags)?;
                self.tensor(*storage, storage.dtype.unwrap_or(Dtype::U8), [offset, size, stride])
            }
            (Global::Rebuild(2), _) => Err(wrong("(storage, offset, size, stride, requires_grad, hooks[, flags])")),
            (
                Global::Rebuild(3),
                [
                    Node::Storage(storage),
                    offset,
                    size,
                    stride,
                    Node::Bool(_),
                    Node::Dict(..) | Node::None,
                    Node::Global(Global::Dtype(name)),
                    flags @ ..,
                ],
            ) if flags.len() <= 1 => {
                self.check_flags(flags)?;
                let refuse =
                    || Error::unsupported(format!("a tensor of dtype torch.{name}, which this crate does not carry"));
                self.tensor(*storage, carried(name).ok_or_else(refuse)?, [offset, size, stride])
            }
            (Global::Rebuild(_), _) => {
                Err(wrong("(storage, offset, size, stride, requires_grad, hooks, dtype[, flags])"))
            }

            (Global::RebuildParameter, [Node::Tensor(tensor), Node::Bool(_), Node::Dict(..) | Node::None]) => {
                Ok(Node::Tensor(tensor.clone()))
            }
            (Global::RebuildParameter, _) => Err(wrong("(tensor, requires_grad, hooks)")),
            (
                Global::RebuildParameterWithState,
                [Node::Tensor(tensor), Node::Bool(_), Node::Dict(..) | Node::None, state],
            ) => {
                self.check_state(state).ok_or_else(|| wrong("a dict of attributes, or two, as its state"))?;
                Ok(Node::Tensor(tensor.clone()))
            }
            (Global::RebuildParameterWithState, _) => Err(wrong("(tensor, requires_grad, hooks, state)")),
            (
                Global::RebuildFromType,
                [
                    Node::Global(
                        function @ (Global::Rebuild(_) | Global::RebuildParameter | Global::RebuildParameterWithState),
                    ),
                    Node::Global(Global::Tensor | Global::Parameter | Global::Buffer),
                    Node::Tuple(inner),
                    state,
                ],
            ) => {
                self.check_state(state).ok_or_else(|| wrong("a dict of attributes, or two, as its state"))?;
                self.call(*function, inner).map_err(|e| e.at(function.name()))
            }
            (Global::RebuildFromType, _) => Err(wrong("(rebuilding function, tensor class, arguments, state)")),
            (Global::Parameter | Global::Buffer, [Node::Tensor(tensor)] | [Node::Tensor(tensor), Node::Bool(_)]) => {
                Ok(Node::Tensor(tensor.clone()))
            }
            (Global::Parameter | Global::Buffer, _) => Err(wrong("a tensor, or a tensor and a bool")),

            // How Python 3 writes bytes in protocol 2.
            (Global::Encode, [Node::Str(text), Node::Str(encoding)]) if matches!(&**encoding, "latin1" | "latin-1") => {
                let bytes: Result<Vec<u8>, _> = text.chars().map(u8::try_from).collect();
                Ok(Node::Bytes(Arc::from(bytes.map_err(|_| wrong("characters below 256"))?)))
            }
            (Global::Encode, _) => Err(wrong("a string and 'latin1'")),
            (Global::Set, []) => Ok(Node::Set(Vec::new(), false)),
            (Global::Set, [Node::List(items) | Node::Tuple(items)]) => {
                self.check_elements(items)?;
                Ok(Node::Set(items.clone(), false))
            }
            (Global::Set, _) => Err(wrong("a list")),
            (Global::Bytearray, []) => Ok(Node::Opaque("bytearray of 0 bytes".into())),
            (Global::Bytearray, [Node::Bytes(bytes)]) => {
                Ok(Node::Opaque(format!("bytearray of {} bytes", bytes.len())))
            }
            (Global::Bytearray, [Node::Str(text), Node::Str(encoding)])
                if matches!(&**encoding, "latin1" | "latin-1") =>
            {
                if text.chars().any(|c| u8::try_from(c).is_err()) {
                    return Err(wrong("characters below 256"));
                }
                Ok(Node::Opaque(format!("bytearray of {} bytes", text.chars().count())))
            }
            (Global::Bytearray, _) => Err(wrong("nothing, bytes, or a string and 'latin-1'")),
            (Global::Complex, [Node::Float(re), Node::Float(im)]) => {
                Ok(Node::Opaque(format!("complex({re:?}, {im:?})")))
            }
            (Global::Complex, _) => Err(wrong("two floats")),
            _ => Err(Error::unsupported("it may be named, not called")),
        }
    }

    /// NEWOBJ: `class.__new__(class, *arguments)`, which for mutable classes makes an empty object.
    fn new_object(&self, global: Global, arguments: &[Id]) -> Result<Node> {
        match global {
            Global::OrderedDict | Global::Counter | Global::Set | Global::Bytearray if !arguments.is_empty() => {
                Err(Error::format(format!("NEWOBJ with {} arguments, none is needed", arguments.len())))
            }
            Global::OrderedDict
            | Global::Counter
            | Global::Set
            | Global::Bytearray
            | Global::Size
            | Global::Device
            | Global::Complex
            | Global::Parameter
            | Global::Buffer => self.call(global, arguments),
            _ => Err(Error::unsupported("NEWOBJ of it is not allowed")),
        }
    }

    /// The flags of a tensor, `{'conj': bool, 'neg': bool}`: they say that what is stored is not yet conjugated or negated.
    fn check_flags(&self, flags: &[&Node]) -> Result<()> {
        let entries = match flags {
            [] | [Node::None] => return Ok(()),
            [Node::Dict(entries, _)] => entries,
            _ => return Err(Error::format("a tensor's flags are not a dict")),
        };
        for &(key, value) in entries {
            match (self.nodes.get(key), self.nodes.get(value)) {
                (Some(Node::Str(key)), Some(Node::Bool(set))) if matches!(&**key, "conj" | "neg") => {
                    if *set {
                        let what =
                            format!("a tensor with the {key} bit set: its values are stored before that operation");
                        return Err(Error::unsupported(what));
                    }
                }
                _ => return Err(Error::unsupported("a tensor's flags hold more than the bools 'conj' and 'neg'")),
            }
        }
        Ok(())
    }

    /// The attributes of a parameter or a subclass: a dict, or a pair of dicts (of `__dict__` and of slots). They are ignored.
    fn check_state(&self, state: &Node) -> Option<()> {
        let attributes = |node: &Node| matches!(node, Node::Dict(..) | Node::None);
        match state {
            Node::Tuple(pair) => {
                pair.len().eq(&2).then_some(())?;
                pair.iter().all(|&id| self.nodes.get(id).is_some_and(attributes)).then_some(())
            }
            node => attributes(node).then_some(()),
        }
    }

    fn tensor(&self, storage: Storage, dtype: Dtype, [offset, size, stride]: [&Node; 3]) -> Result<Node> {
        let number = |what: &str, node: &Node| match node {
            Node::Int(n) => {
                usize::try_from(*n).map_err(|_| Error::format(format!("{what} {n}; it must not be negative")))
            }
            _ => Err(Error::format(format!("{what} that is no integer of 64 bits"))),
        };
        let numbers = |what: &str, node: &Node| match node {
            Node::Tuple(items) | Node::List(items) if items.len() <= MAX_DIMS => items
                .iter()
                .map(|&id| number(what, self.nodes.get(id).unwrap_or(&Node::None)))
                .collect::<Result<Vec<_>>>(),
            Node::Tuple(items) | Node::List(items) => {
                Err(Error::format(format!("{} dimensions; the limit is {MAX_DIMS}", items.len())))
            }
            _ => Err(Error::format(format!("a {what} is no tuple"))),
        };
        let (offset, shape, strides) = (number("offset", offset)?, numbers("size", size)?, numbers("stride", stride)?);
        if shape.len() != strides.len() {
            return Err(Error::format(format!("{} sizes and {} strides", shape.len(), strides.len())));
        }
        let refuse =
            |what: String| Error::format(format!("size {shape:?}, strides {strides:?}, offset {offset}: {what}"));
        let elements = element_count(&shape).ok_or_else(|| refuse("the number of elements overflows".into()))?;
        let there = storage.bytes.checked_div(dtype.size_bytes() as u64).unwrap_or(0);
        if elements > 0 {
            let last = shape.iter().zip(&strides).try_fold(offset, |last, (&size, &stride)| {
                last.checked_add(size.saturating_sub(1).checked_mul(stride)?)
            });
            let last = last.ok_or_else(|| refuse("the last position overflows".into()))?;
            if last as u64 >= there {
                return Err(refuse(format!("the last element is at position {last}, the storage has {there}")));
            }
        }
        let bytes = (elements as u64).checked_mul(dtype.size_bytes() as u64);
        if bytes.is_none_or(|n| n > EXPANDED_BYTES && n / EXPANSION > storage.bytes) {
            return Err(refuse(format!(
                "an expanded view of {elements} elements on a storage of {there}; the limit is {EXPANSION} times its size"
            )));
        }
        let tensor =
            TensorRef { dtype, offset, elements, record: storage.record, storage_bytes: storage.bytes, shape, strides };
        Ok(Node::Tensor(Arc::new(tensor)))
    }
}

/// The name of an opcode that is refused, where a name helps.
fn known_opcode(opcode: u8) -> &'static str {
    match opcode {
        0x82..=0x84 => " (EXT, the registry of extensions)",
        0x97 | 0x98 => " (out-of-band buffers)",
        b'o' => " (OBJ, a call)",
        b'P' => " (PERSID, of protocol 0)",
        b'I' | b'L' | b'F' | b'S' | b'V' | b'g' | b'p' | b'd' | b'l' => " (of protocol 0 or 1)",
        _ => "",
    }
}

/// How many bytes containers take for these references, and for the room that they make beside.
fn references(items: &[Id]) -> usize {
    ALLOCATION_BYTES.saturating_add(items.len().saturating_mul(size_of::<Id>()))
}

/// In every dict, a key that is set again keeps its place and takes the new value, as in Python.
fn merge_keys(nodes: &mut Nodes) -> Result<()> {
    let mut keys = Keys { numbers: HashMap::new(), of: vec![Keys::UNKNOWN; nodes.len()] };
    for id in nodes.ids() {
        let mut entries = match nodes.get_mut(id) {
            Some(Node::Dict(entries, _)) if entries.len() > 1 => std::mem::take(entries),
            _ => continue,
        };
        // The place that each key has among the first `kept` entries, which are those that stay.
        let (mut places, mut kept) = (HashMap::<u32, usize>::new(), 0usize);
        for next in 0..entries.len() {
            let Some(&entry) = entries.get(next) else { break };
            let place = *places.entry(keys.number(nodes, entry.0, 0)?).or_insert(kept);
            match entries.get_mut(place) {
                Some(known) if place < kept => known.1 = entry.1,
                Some(free) => {
                    *free = entry;
                    kept = kept.saturating_add(1);
                }
                None => {}
            }
        }
        entries.truncate(kept);
        entries.shrink_to_fit();
        if let Some(Node::Dict(empty, _)) = nodes.get_mut(id) {
            *empty = entries;
        }
    }
    Ok(())
}

/// Numbers that are equal where Python's keys are.
struct Keys {
    numbers: HashMap<Box<[u8]>, u32>,
    /// The numbers by [`Id`].
    of: Vec<u32>,
}

impl Keys {
    const UNKNOWN: u32 = u32::MAX;

    fn number(&mut self, nodes: &Nodes, id: Id, depth: usize) -> Result<u32> {
        let place = usize::try_from(id).unwrap_or(usize::MAX);
        if let Some(&number) = self.of.get(place).filter(|&&number| number != Self::UNKNOWN) {
            return Ok(number);
        }
        let text = |tag: u8, bytes: &[u8]| [&[tag], bytes].concat();
        let canonical = match nodes.get(id).unwrap_or(&Node::None) {
            Node::None => text(b'N', &[]),
            // True == 1 == 1.0 are one key.
            Node::Bool(b) => text(b'i', &i64::from(*b).to_le_bytes()),
            Node::Int(n) => text(b'i', &n.to_le_bytes()),
            Node::Float(f) if f.fract() == 0.0 && (-TWO_63..TWO_63).contains(f) => {
                text(b'i', &(*f as i64).to_le_bytes())
            }
            // It may equal an integer beyond 64 bits.
            Node::Float(f) if f.abs() >= TWO_63 && f.is_finite() => {
                return Err(Error::unsupported(format!(
                    "the float {f:e} is or lies in a key of a dict; the limit is 2^63"
                )));
            }
            // nan equals only itself: the one object.
            Node::Float(f) if f.is_nan() => text(b'n', &id.to_le_bytes()),
            Node::Float(f) => text(b'f', &f.to_le_bytes()),
            Node::Big(bytes) => text(b'I', bytes),
            Node::Str(s) => text(b's', s.as_bytes()),
            Node::Bytes(bytes) => text(b'b', bytes),
            // A complex number may equal any other; a bytearray is no key.
            Node::Opaque(what) if what.starts_with("torch.device") => text(b'o', what.as_bytes()),
            Node::Global(global) => text(b'g', global.name().as_bytes()),
            Node::Tuple(items) if depth < MAX_KEY_DEPTH => {
                let mut canonical = vec![b't'];
                for &item in items {
                    canonical.extend(self.number(nodes, item, depth.saturating_add(1))?.to_le_bytes());
                }
                canonical
            }
            // Also frozen sets, which are equal where their elements are, in whatever order.
            _ => return Err(Error::format(format!("{} is or lies in a key of a dict", nodes.kind(id)))),
        };
        let next = u32::try_from(self.numbers.len()).unwrap_or(Self::UNKNOWN);
        let number = *self.numbers.entry(canonical.into()).or_insert(next);
        if self.numbers.len() > MAX_KEYS {
            return Err(Error::format(format!("more than {MAX_KEYS} different keys of dicts")));
        }
        if let Some(known) = self.of.get_mut(place) {
            *known = number;
        }
        Ok(number)
    }
}
