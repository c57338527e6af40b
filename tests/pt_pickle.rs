//! Pickles that abuse each opcode and each call, and pickles that are only unusual.

mod common;
use common::*;
use crosscoder::Config;
use crosscoder::files::TensorFile;
use crosscoder::info::{Style, info};
use crosscoder::pt::{PathPart, PtFile, Save, Value, Writer};
use std::io::Cursor;

fn open(pickle: &[u8]) -> crosscoder::Result<PtFile<Cursor<Vec<u8>>>> {
    PtFile::new(Cursor::new(pt(pickle)))
}

/// The value under `w` of a dict with this value.
#[track_caller]
fn value<T>(value: &[u8], look: impl FnOnce(Value<'_>) -> T) -> T {
    let pt = open(&dict(value)).unwrap();
    look(pt.root().get("w").unwrap())
}

#[track_caller]
fn bad(what: &str, value: &[u8], words: &[&str]) {
    refused(what, &pt(&dict(value)), words);
}

fn call(global: &str, arguments: &[u8]) -> Vec<u8> {
    let (module, name) = global.rsplit_once('.').unwrap();
    cat(&[format!("c{module}\n{name}\n").as_bytes(), arguments, b"R"])
}

#[test]
fn integers_of_any_width() {
    let int = |bytes: &[u8]| value(bytes, |v| v.as_i64());
    assert_eq!(int(b"K\xff"), Some(255));
    assert_eq!(int(b"M\xff\xff"), Some(65535));
    assert_eq!(int(b"J\xff\xff\xff\xff"), Some(-1));
    assert_eq!(int(b"\x8a\x00"), Some(0));
    assert_eq!(int(b"\x8a\x01\xff"), Some(-1));
    assert_eq!(int(b"\x8a\x02\xff\x00"), Some(255));
    assert_eq!(int(b"\x8a\x01\x80"), Some(-128));
    assert_eq!(int(b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"), Some(i64::MAX));
    assert_eq!(int(b"\x8a\x08\0\0\0\0\0\0\0\x80"), Some(i64::MIN));
    // Needless bytes of sign.
    assert_eq!(int(b"\x8a\x0a\x07\0\0\0\0\0\0\0\0\0"), Some(7));
    assert_eq!(int(b"\x8a\x0a\xf9\xff\xff\xff\xff\xff\xff\xff\xff\xff"), Some(-7));
    assert_eq!(int(b"\x8b\x02\0\0\0\x00\x80"), Some(-32768));
    let big = |bytes: &[u8]| {
        value(bytes, |v| match v {
            Value::Big(n) => n.to_string(),
            other => format!("{other:?}"),
        })
    };
    assert_eq!(big(b"\x8a\x09\0\0\0\0\0\0\0\x80\0"), "9223372036854775808");
    assert_eq!(big(b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\x7f\xff"), "-9223372036854775809");
    assert_eq!(big(&cat(&[b"\x8b\x00\x02\0\0", &[0; 511], &[1]])).len(), 1231);
    bad("LONG1 cut", b"\x8a\xff\0", &["claims 255 bytes"]);
    bad("LONG4 negative", b"\x8b\xff\xff\xff\xff", &["LONG4"]);
    bad("LONG4 of 2 GiB", b"\x8b\xff\xff\xff\x7f", &["claims 2147483647 bytes"]);
}

#[test]
fn plain_values() {
    assert_eq!(value(b"G\x3f\xf8\0\0\0\0\0\0", |v| v.as_f64()), Some(1.5));
    assert_eq!(value(b"\x88", |v| v.as_bool()), Some(true));
    assert!(value(b"N", |v| matches!(v, Value::None)));
    for text in [
        &b"X\x02\0\0\0\xc3\xa9"[..],
        b"\x8c\x02\xc3\xa9",
        b"\x8d\x02\0\0\0\0\0\0\0\xc3\xa9",
        b"U\x02\xc3\xa9",
        b"T\x02\0\0\0\xc3\xa9",
    ] {
        assert_eq!(value(text, |v| v.as_str().map(str::to_string)), Some("é".into()));
    }
    for bytes in [&b"C\x02\xc3\xff"[..], b"B\x02\0\0\0\xc3\xff", b"\x8e\x02\0\0\0\0\0\0\0\xc3\xff"] {
        assert!(value(bytes, |v| matches!(v, Value::Bytes(b"\xc3\xff"))));
    }
    let encode = call("_codecs.encode", &cat(&[&s("Ã\u{ff}"), &s("latin1"), b"\x86"]));
    assert!(value(&encode, |v| matches!(v, Value::Bytes(b"\xc3\xff"))));
    for (opaque, text) in [
        (&b"\x96\x02\0\0\0\0\0\0\0ab"[..], "bytearray of 2 bytes"),
        (b"ctorch\nfloat8_e5m2\n", "float8_e5m2"),
        (b"ctorch\nint32\n", "int32"),
        (&call("torch.device", &cat(&[&s("cuda"), b"K\x01\x86"])), "torch.device(\"cuda:1\")"),
        (&call("torch.device", &cat(&[&s("cpu"), b"\x85"])), "torch.device(\"cpu\")"),
        (&call("builtins.complex", b"G\x3f\xf8\0\0\0\0\0\0G\x3f\xf8\0\0\0\0\0\0\x86"), "complex(1.5, 1.5)"),
        (&call("__builtin__.complex", b"G\x3f\xf8\0\0\0\0\0\0G\x3f\xf8\0\0\0\0\0\0\x86"), "complex(1.5, 1.5)"),
        (&call("builtins.bytearray", b"C\x01a\x85"), "bytearray of 1 bytes"),
        (&call("__builtin__.bytearray", b")"), "bytearray of 0 bytes"),
        (&call("builtins.bytearray", &cat(&[&s("é"), &s("latin-1"), b"\x86"])), "bytearray of 1 bytes"),
        (&storage("FloatStorage", "0", 4), "a storage"),
    ] {
        value(opaque, |v| match v {
            Value::Opaque(what) => assert_eq!(what, text),
            other => panic!("{other:?} for {text}"),
        });
    }
    for (items, count) in [
        (&b"(K\x01K\x02t"[..], 2),
        (b")", 0),
        (b"K\x01\x85", 1),
        (b"K\x01K\x02\x86", 2),
        (b"K\x01K\x02K\x03\x87", 3),
        (b"](K\x01K\x02eK\x03a", 3),
        (b"\x8f(K\x01K\x02\x90", 2),
        (b"(K\x01K\x02\x91", 2),
        (&call("builtins.set", b"](K\x01K\x02e\x85"), 2),
        (&call("__builtin__.set", b")"), 0),
        (&call("torch.Size", b"(K\x01K\x02t\x85"), 2),
        (&call("torch.Size", b")"), 0),
        (b"ctorch\nSize\n(K\x01K\x02t\x85\x81", 2),
    ] {
        assert_eq!(value(items, |v| v.items().count()), count);
    }
    for (entries, count) in [
        (&b"}"[..], 0),
        (b"}K\x01K\x02s", 1),
        (b"}(K\x01K\x02K\x03K\x04u", 2),
        (ORDERED, 0),
        (b"ccollections\nOrderedDict\n](](K\x01K\x02ee\x85R", 1),
        (b"ccollections\nOrderedDict\n](K\x01K\x02\x86K\x03K\x04\x86e\x85R", 2),
        (b"ccollections\nOrderedDict\n}K\x01K\x02s\x85R", 1),
        (b"ccollections\nOrderedDict\n)\x81", 0),
        (b"ccollections\nOrderedDict\n)}\x92", 0),
        (b"ccollections\nCounter\n}K\x01K\x02s\x85R", 1),
        (b"ccollections\nCounter\n)R", 0),
    ] {
        assert_eq!(value(entries, |v| v.entries().count()), count);
    }
}

#[test]
fn a_key_that_is_set_again_keeps_its_place() {
    let entries = |pickle: &[u8]| {
        value(pickle, |v| v.entries().map(|(k, v)| (k.to_string(), v.as_i64().unwrap())).collect::<Vec<_>>())
    };
    let pairs = |list: &[(&str, i64)]| list.iter().map(|&(k, v)| (k.to_string(), v)).collect::<Vec<_>>();
    assert_eq!(
        entries(&cat(&[b"}(", &s("a"), b"K\x01", &s("b"), b"K\x02", &s("a"), b"K\x03u"])),
        pairs(&[("a", 3), ("b", 2)])
    );
    // True == 1 == 1.0, and "1" is another key.
    let ones = cat(&[b"}(K\x01K\x01\x88K\x02G\x3f\xf0\0\0\0\0\0\0K\x03", &s("1"), b"K\x04u"]);
    assert_eq!(entries(&ones), pairs(&[("1", 3), ("1", 4)]));
    let tuples = cat(&[b"}(K\x01K\x02\x86K\x01(K\x01K\x02tK\x02", b"K\x01\x85K\x03u"]);
    assert_eq!(entries(&tuples), pairs(&[("(1, 2)", 2), ("(1,)", 3)]));
    // nan equals only itself, the one object; floats equal integers as long as these have 64 bits.
    let nan = [&b"G"[..], &f64::NAN.to_be_bytes()].concat();
    let nans = cat(&[b"}(", &nan, b"K\x01", &nan, b"q\x07K\x02h\x07K\x03h\x07\x85K\x04h\x07\x85K\x05u"]);
    assert_eq!(entries(&nans), pairs(&[("NaN", 1), ("NaN", 3), ("(NaN,)", 5)]));
    let float = |f: f64| [&b"G"[..], &f.to_be_bytes()].concat();
    for n in [i64::MIN, -(1 << 60), 9_100_000_000_000_000_000, i64::MAX - 1023] {
        let same = cat(&[b"}(", &float(n as f64), b"K\x01", &int(n), b"K\x02u"]);
        assert_eq!(entries(&same).len(), 1, "{n}");
    }
    assert_eq!(entries(&cat(&[b"}(", &float(f64::INFINITY), b"K\x01", &float(f64::NEG_INFINITY), b"K\x02u"])).len(), 2);
    for key in [&b"(K\x01\x91"[..], &call("builtins.complex", b"G\0\0\0\0\0\0\0\0G\0\0\0\0\0\0\0\0\x86")] {
        bad("equal to other types, or in another order", &cat(&[b"}(", key, b"NNNu"]), &["lies in a key of a dict"]);
    }
    bad("a large float", &cat(&[b"}(", &float(1e19), b"NNNu"]), &["the float 1e19 is or lies in a key"]);
    for key in [&b"]"[..], b"}", b"\x8f", &w(), &storage("FloatStorage", "0", 4)] {
        bad("key", &cat(&[b"}", key, b"K\x01s"]), &["cannot be a key"]);
        bad("element", &cat(&[b"\x8f(", key, b"\x90"]), &["cannot be a key"]);
        bad("frozen element", &cat(&[b"(", key, b"\x91"]), &["cannot be a key"]);
    }
    bad("key with a list in it", b"}(]\x85K\x01N]\x85u", &["odd", "key"]);
    bad("key with a list in it", b"}(]\x85K\x01NNu", &["key"]);
    let mut deep = b"}(N".to_vec();
    deep.extend([0x85; 100]);
    deep.extend(b"K\x01K\x02K\x03u");
    bad("deep key", &deep, &["key"]);
}

#[test]
fn paths_tell_keys_apart() {
    let pickle = root(&cat(&[
        b"}(",
        &s("a.b"),
        &w(),
        &s("a"),
        b"}",
        &s("b"),
        &w(),
        b"s",
        &s("1"),
        &w(),
        b"K\x01",
        &w(),
        b"J\xff\xff\xff\xff",
        &w(),
        b"N",
        &w(),
        b"K\x07]",
        &w(),
        b"au",
    ]));
    let pt = open(&pickle).unwrap();
    let key = |k: &str| PathPart::from(k);
    let paths: Vec<Vec<PathPart>> = pt.tensors().iter().map(|t| t.path.clone()).collect();
    assert_eq!(
        paths,
        [
            vec![key("a.b")],
            vec![key("a"), key("b")],
            vec![key("1")],
            vec![PathPart::Index(1)],
            vec![PathPart::Index(-1)],
            vec![key("None")],
            vec![PathPart::Index(7), PathPart::Index(0)],
        ]
    );
    assert_eq!((pt.tensors()[0].name.as_str(), pt.tensors()[1].name.as_str()), ("a.b", "a.b"));
    assert!(pt.find(&[key("a"), key("b")]).is_ok());
    assert!(pt.find(&[key("a")]).is_err());
}

#[test]
fn the_memo_holds_references() {
    // {'x': d, 'y': d} where d is memoized empty and filled later; a list likewise.
    let pickle = cat(&[b"}(", &s("x"), b"}q\x05", &s("w"), &w(), b"s", &s("y"), b"h\x05u"]);
    let pt = open(&root(&pickle)).unwrap();
    let names: Vec<&str> = pt.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["x.w", "y.w"]);
    // Memoized, referred to, and only then filled.
    let pickle = cat(&[b"](]q\x00h\x00", b"h\x00K\x01aK\x02e"]);
    let pt = open(&root(&pickle)).unwrap();
    let lengths: Vec<usize> = pt.root().items().map(|v| v.items().count()).collect();
    assert_eq!(lengths, [1, 1, 1, 0]);
    // MEMOIZE counts; LONG forms; a number taken twice means the later value.
    let pickle = cat(&[b"](K\x07\x94K\x08\x94h\x00h\x01r\x00\x00\x01\0j\x00\x00\x01\0K\x09q\x00h\x00e"]);
    let pt = open(&root(&pickle)).unwrap();
    let numbers: Vec<i64> = pt.root().items().filter_map(|v| v.as_i64()).collect();
    assert_eq!(numbers, [7, 8, 7, 8, 8, 9, 9]);
    bad("BINGET", b"h\x09", &["never memoized"]);
    bad("LONG_BINGET", b"j\xff\xff\xff\xff", &["never memoized"]);
    refused("BINPUT of nothing", &pt_of(b"q\x00}"), &["stack is empty"]);
    refused("BINPUT of a mark", &pt_of(b"}(q\x00u"), &["last MARK"]);
}

fn pt_of(code: &[u8]) -> Vec<u8> {
    pt(&root(code))
}

#[test]
fn values_that_contain_themselves() {
    for pickle in [
        &b"]q\x00h\x00a"[..],
        b"}q\x00K\x01h\x00s",
        b"](h\x00e",
        // t = ([t],), as CPython writes it.
        b"]q\x00h\x00\x85q\x01a0h\x01",
        b"]q\x00]q\x01h\x00ah\x01a",
    ] {
        let file = pt_of(pickle);
        let e = read_all(&file).unwrap_err().to_string();
        assert!(e.contains("nest deeper") || e.contains("never memoized"), "{e}");
    }
    // Attributes are not walked: an OrderedDict that is its own attribute is one dict.
    accepted("attribute", &pt_of(&cat(&[ORDERED, b"q\x00", &s("w"), &w(), b"s}", &s("me"), b"h\x00sb"])));
}

#[test]
fn nesting_has_a_limit() {
    for (open_with, close) in [(&b"]"[..], &b"a"[..]), (b"(", b"t"), (b"}K\x01", b"s"), (b"", b"\x85")] {
        let nested = |depth: usize, inner: &[u8]| {
            let inner = if close == b"s" || close == b"a" || close == b"t" || close == b"\x85" { inner } else { b"" };
            pt_of(&cat(&[&open_with.repeat(depth), inner, &close.repeat(depth)]))
        };
        accepted("60", &nested(60, &w()));
        accepted("900", &nested(900, &w()));
        for depth in [1_100, 5_000, 100_000] {
            refused("deep", &nested(depth, &w()), &["nest deeper"]);
        }
    }
    // Deep and dropped: nothing is left to walk.
    accepted("popped", &pt_of(&cat(&[&b"]".repeat(100_000), &b"a".repeat(99_999), b"0}", &s("w"), &w(), b"s"])));
}

#[test]
fn walks_have_a_limit() {
    let mut laughs = cat(&[b"]q\x00"]);
    for _ in 0..40 {
        laughs.extend(b"h\x00h\x00\x86q\x00");
    }
    refused("2^40 references to a list", &pt_of(&laughs), &["visit more", "take more"]);
    let mut laughs = cat(&[&w(), b"q\x00"]);
    for _ in 0..40 {
        laughs.extend(b"h\x00h\x00\x86q\x00");
    }
    refused("2^40 references to a tensor", &pt_of(&laughs), &["visit more", "take more"]);
    // A million references to one long string.
    let long = cat(&[&s(&"x".repeat(10_000)), b"q\x000](", &b"h\x00".repeat(1_000_000), b"e"]);
    refused("long strings", &pt_of(&long), &["take more"]);
    let keys = cat(&[&s(&"x".repeat(10_000)), b"q\x000](", &b"}h\x00K\x01s".repeat(100_000), b"e"]);
    refused("long keys", &pt_of(&keys), &["take more"]);
    let sets = cat(&[b"](", &b"K\x01".repeat(5_000), b"eq\x000](", &b"cbuiltins\nset\nh\x00\x85R".repeat(5_000), b"e"]);
    refused("copies", &pt_of(&sets), &["hold more"]);
    let keys = cat(&[b"}", &s(&"x".repeat(1 << 20)), b"}", &s("y"), b"Nss"]);
    refused("a long path", &pt_of(&keys), &["the keys on the way to a value have 1048577 bytes; the limit is 1048576"]);
    // The digits of an integer take time by the square of its length.
    let integers = |times: usize| {
        let integer = cat(&[b"\x8b\x00\x10\0\0", &[1; 4096]]);
        pt_of(&cat(&[&integer, b"q\x000](", &b"h\x00".repeat(times), &w(), b"e"]))
    };
    accepted("three long integers", &integers(3));
    refused("five long integers", &integers(5), &["take more"]);
    let device = cat(&[&call("torch.device", &cat(&[&s(&"x".repeat(64)), b"\x85"])), b"q\x000"]);
    let devices = |times: usize| pt_of(&cat(&[&device, b"](", &b"h\x00".repeat(times), &w(), b"e"]));
    accepted("references to a device's name", &devices(600_000));
    refused("more of them", &devices(800_000), &["take more"]);
    // An allocation each, whatever their length.
    let strings = |times: usize| pt_of(&cat(&[&b"U\x01a0".repeat(times), &w()]));
    accepted("a million strings", &strings(1_000_000));
    refused("more of them", &strings(1_600_000), &["hold more than 50331648 bytes"]);
    let numbers = |times: usize| pt_of(&cat(&[&b"M\x00\x010".repeat(times), &w()]));
    accepted("two million numbers", &numbers(2_000_000));
    refused("more of them", &numbers(2_200_000), &["more than 2097152 values"]);
    accepted("a hundred thousand numbers", &pt_of(&cat(&[b"](", &w(), &b"K\x01".repeat(100_000), b"e"])));
}

/// A call copies what it is given; 48 MiB for what values hold is the limit.
#[test]
fn calls_pay_for_what_they_copy() {
    const COUNT: usize = 1 << 16;
    const LIMIT: usize = 48 << 20;
    let numbers = b"K\x01".repeat(COUNT);
    let keys: Vec<u8> = (0..=u16::MAX).flat_map(|n| [b'M', n as u8, (n >> 8) as u8]).collect();
    let entries: Vec<u8> = keys.as_chunks::<3>().0.iter().flat_map(|key| [key, &b"N"[..]].concat()).collect();
    let (list, tuple) = (cat(&[b"](", &numbers, b"e"]), cat(&[b"(", &numbers, b"t"]));
    let pairs = cat(&[b"K\x01N\x86q\x01](", &b"h\x01".repeat(COUNT), b"e"]);
    let text = cat(&[&s("latin1"), b"q\x010", &s(&"x".repeat(COUNT))]);
    // Sizes and strides of 64 dimensions, and what a tensor takes beside these.
    let view = cat(&[b"(", &storage("FloatStorage", "0", 4), &int(0), &ints(&[1; 64]), &ints(&[1; 64]), b"t"]);
    for (global, argument, arguments, each) in [
        ("torch.Size", &tuple, &b"h\0\x85"[..], 4 * COUNT),
        ("torch.Size", &list, b"h\0\x85", 4 * COUNT),
        ("builtins.set", &list, b"h\0\x85", 4 * COUNT),
        ("collections.OrderedDict", &cat(&[b"}(", &entries, b"u"]), b"h\0\x85", 8 * COUNT),
        ("collections.OrderedDict", &pairs, b"h\0\x85", 8 * COUNT),
        ("_codecs.encode", &text, b"h\0h\x01\x86", COUNT),
        ("torch._utils._rebuild_tensor", &view, b"h\0", 1180),
    ] {
        let file = |times: usize| {
            let calls = cat(&[&call(global, arguments), b"0"]).repeat(times);
            pt(&root(&cat(&[argument, b"q\x000", &calls, &w()])))
        };
        accepted(global, &file(LIMIT / each * 9 / 10));
        refused(global, &file(LIMIT / each + 1), &["calls hold more than 50331648 bytes"]);
    }
}

#[test]
fn globals_are_compared_whole() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("builtins", "print"),
        ("builtins", "frozenset"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("runpy", "_run_code"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("_codecs", "decode"),
        ("_codecs", "encode "),
        ("codecs", "encode"),
        ("collections", "OrderedDict.__init__"),
        ("collections", "ordereddict"),
        ("collections", "defaultdict"),
        ("collections.OrderedDict", ""),
        ("", "OrderedDict"),
        ("torch", "load"),
        ("torch", "FloatStorage.from_file"),
        ("torch", "FloatTensor"),
        ("torch", "storage.UntypedStorage"),
        ("torch", ""),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch.cuda", "FloatStorage"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v4"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_qtensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage"),
        ("torch._utils ", "_rebuild_tensor_v2"),
        ("torch._tensor", "_rebuild_from_type"),
        ("torch.nn.modules.linear", "Linear"),
        ("numpy", "dtype"),
        ("__torch__", "M"),
    ] {
        let whole = format!("{module}.{name}");
        let named = format!("c{module}\n{name}\n");
        refused(&whole, &pt_of(named.as_bytes()), &[&whole]);
        refused(&whole, &pt_of(&cat(&[named.as_bytes(), b"0}"])), &[&whole]);
        let stacked = cat(&[&s(module), &s(name), b"\x93"]);
        refused(&whole, &pt_of(&stacked), &[&whole]);
        refused(&whole, &pt_of(&cat(&[b"}", &s("w"), &stacked, b"s0}"])), &[&whole]);
    }
    for (name, word) in [
        ("_rebuild_sparse_csr_tensor", "sparse"),
        ("_rebuild_qtensor", "quantized"),
        ("_rebuild_meta_tensor_no_storage", "meta"),
    ] {
        refused(name, &pt_of(format!("ctorch._utils\n{name}\n").as_bytes()), &[word]);
    }
    accepted("STACK_GLOBAL", &pt_of(&cat(&[&s("collections"), &s("OrderedDict"), b"\x93)R", &s("w"), &w(), b"s"])));
    bad("STACK_GLOBAL of numbers", b"K\x01K\x02\x93", &["two strings"]);
    bad("GLOBAL that is not UTF-8", b"ctorch\n\xff\n", &["UTF-8"]);
}

#[test]
fn opcodes_outside_the_list() {
    for (code, word) in [
        (&b"(ios\nsystem\n"[..], "os.system"),
        (b"(ccollections\nOrderedDict\no", "OBJ"),
        (b"\x82\x01", "EXT"),
        (b"\x83\x01\0", "EXT"),
        (b"\x84\x01\0\0\0", "EXT"),
        (b"\x97", "out-of-band"),
        (b"\x98", "out-of-band"),
        (b"I1\n", "protocol 0"),
        (b"L1L\n", "protocol 0"),
        (b"F1.0\n", "protocol 0"),
        (b"S'a'\n", "protocol 0"),
        (b"Va\n", "protocol 0"),
        (b"P1\n", "PERSID"),
        (b"(d", "protocol 0"),
        (b"(l", "protocol 0"),
        (b"N2", "opcode 32"),
        (b"\xff", "opcode ff"),
        (b"\0", "opcode 00"),
    ] {
        refused(word, &pt_of(code), &[word]);
        bad(word, code, &[word]);
    }
    for version in [0, 1, 6, 255] {
        refused("protocol", &pt(&[0x80, version, b'}', b'.']), &["protocol"]);
    }
    for version in 2..=5 {
        let mut pickle = dict(&w());
        pickle[1] = version;
        accepted("protocol", &pt(&pickle));
    }
    let frame = |n: u64| pt(&cat(&[b"\x80\x04\x95", &n.to_le_bytes(), &dict(&w())[2..]]));
    accepted("FRAME", &frame(dict(&w()).len() as u64 - 2));
    refused("FRAME beyond the end", &frame(dict(&w()).len() as u64), &["FRAME"]);
    refused("FRAME of 2^63", &frame(1 << 63), &["FRAME"]);
    refused("after STOP", &pt(&cat(&[&dict(&w()), b"\0"])), &["STOP"]);
    refused("no STOP", &pt(&dict(&w())[..dict(&w()).len() - 1]), &["cut off"]);
    refused("nothing", &pt(b""), &["cut off"]);
    refused("STOP at once", &pt(b"\x80\x02."), &["stack is empty"]);
    accepted("more below", &pt_of(&cat(&[b"K\x01](", b"K\x01e}", &s("w"), &w(), b"s"])));
    let whole = dict(&w());
    for cut in 0..whole.len() {
        assert!(read_all(&pt(&whole[..cut])).is_err(), "cut to {cut}");
    }
}

#[test]
fn every_operand_lies_inside() {
    for (opcode, width) in
        [(b'X', 4), (b'B', 4), (b'T', 4), (0x8d, 8), (0x8e, 8), (0x96, 8), (0x8c, 1), (b'C', 1), (b'U', 1)]
    {
        for length in [u64::MAX, 1 << 60, 1 << 31, 255, 12] {
            let mut code = vec![opcode];
            code.extend(&length.to_le_bytes()[..width]);
            refused("length", &pt(&cat(&[b"\x80\x02", &code])), &["claims", "cut off", "UTF-8"]);
        }
    }
    for text in
        [&b"X\x01\0\0\0\xff"[..], b"X\x02\0\0\0\xc0\x80", b"\x8c\x03\xed\xa0\x80", b"U\x01\x80", b"T\x01\0\0\0\xe9"]
    {
        bad("text", text, &["UTF-8"]);
    }
}

#[test]
fn the_stack_stops_at_marks() {
    for code in [
        &b"}(s"[..],
        b"](a",
        b"K\x01(\x85",
        b"K\x01(R",
        b"}K\x01(K\x02s",
        b"K\x01(0",
        b"(.",
        b"K\x01(Q",
        b"](\x93",
        b"}(b",
        b"}(q\x00u",
        b"K\x01K\x02(\x86",
    ] {
        refused("below the mark", &pt_of(code), &["last MARK"]);
    }
    for code in [&b"t"[..], b"}u", b"]e", b"1", b"\x8f\x90", b"\x91"] {
        refused("no mark", &pt_of(code), &["MARK is needed"]);
    }
    for code in [
        &b"0"[..],
        b"s",
        b"K\x01s",
        b"a",
        b"R",
        b"\x81",
        b"\x92",
        b"b",
        b"\x85",
        b"\x86",
        b"\x87",
        b"Q",
        b"\x93",
        b"q\x00",
        b"\x94",
    ] {
        refused("empty", &pt_of(code), &["stack is empty"]);
    }
    refused("odd SETITEMS", &pt_of(b"}(K\x01u"), &["odd"]);
    accepted("POP_MARK", &pt_of(&cat(&[b"}(K\x01K\x021", &s("w"), &w(), b"s"])));
}

#[test]
fn items_go_where_they_belong() {
    for target in [&b"N"[..], b"K\x05", b")", b"\x8f", b"X\0\0\0\0", b"ctorch\nSize\n", &w()] {
        bad("SETITEM", &cat(&[target, b"K\x01K\x01s"]), &["needs a dict"]);
        bad("SETITEMS", &cat(&[target, b"(K\x01K\x01u"]), &["needs a dict"]);
        bad("APPEND", &cat(&[target, b"K\x01a"]), &["needs a list"]);
        bad("APPENDS", &cat(&[target, b"(K\x01e"]), &["needs a list"]);
    }
    bad("SETITEM of a list", b"]K\x00K\x01s", &["needs a dict"]);
    bad("APPEND to a dict", b"}K\x01a", &["needs a list"]);
    for target in [&b"]"[..], b"}", b"N", b"(\x91"] {
        bad("ADDITEMS", &cat(&[target, b"(K\x01\x90"]), &["needs a set"]);
    }
    for target in [&b"}"[..], b"]", b"N", b"\x8f", &w(), b"ctorch\nTensor\n", b"K\x01"] {
        bad("BUILD", &cat(&[target, b"}b"]), &["BUILD needs"]);
    }
    for state in [&b"N"[..], b"]", b"K\x01", b"N}\x86", b"X\0\0\0\0"] {
        bad("state", &cat(&[ORDERED, state, b"b"]), &["attributes"]);
    }
    bad("a tensor in a set", &cat(&[b"(", &w(), b"\x85\x91"]), &["tensor in a set"]);
}

#[test]
fn calls_take_their_arguments() {
    let tensor = w();
    let args = |parts: &[&[u8]]| cat(&[b"(", &parts.concat(), b"t"]);
    let (st, zero, size, stride) = (storage("FloatStorage", "0", 4), int(0), ints(&[2, 2]), ints(&[2, 1]));
    let good: [&[u8]; 6] = [&st, &zero, &size, &stride, b"\x89", ORDERED];
    let v2 = |parts: &[&[u8]]| call("torch._utils._rebuild_tensor_v2", &args(parts));
    accepted("v2", &pt(&dict(&v2(&good))));
    accepted("hooks None", &pt(&dict(&v2(&[&st, &zero, &size, &stride, b"\x88", b"N"]))));
    accepted("flags", &pt(&dict(&v2(&[&st, &zero, &size, &stride, b"\x88", ORDERED, b"N"]))));
    let flags = |key: &str, set: &[u8]| cat(&[b"}", &s(key), set, b"s"]);
    accepted("flags", &pt(&dict(&v2(&[&good.concat(), &flags("conj", b"\x89")]))));
    bad("conj", &v2(&[&good.concat(), &flags("conj", b"\x88")]), &["conj"]);
    bad("neg", &v2(&[&good.concat(), &flags("neg", b"\x88")]), &["neg"]);
    bad("flags", &v2(&[&good.concat(), &flags("neg", b"K\x01")]), &["flags"]);
    bad("flags", &v2(&[&good.concat(), &flags("other", b"\x88")]), &["flags"]);
    bad("flags", &v2(&[&good.concat(), b"K\x01"]), &["flags"]);
    let needed = "needs (storage, offset, size, stride, requires_grad, hooks[, flags])";
    bad("one too many", &v2(&[&good.concat(), b"}}"]), &[needed]);
    for n in 0..6 {
        bad("too few", &v2(&good[..n]), &[needed]);
        for kind in [&b"N"[..], b"X\0\0\0\0", b"]", b"K\x01", b"}", b"\x8f"] {
            let mut parts = good;
            parts[n] = kind;
            // Offset 1 is a number, only out of place; hooks may be None or a dict; an empty list is no sizes.
            if (n == 1 && kind == b"K\x01") || (n == 5 && matches!(kind, b"N" | b"}")) {
                continue;
            }
            bad("kind", &v2(&parts), &["needs (", "offset", "size", "stride"]);
        }
    }
    bad("not a tuple", &cat(&[b"ctorch._utils\n_rebuild_tensor_v2\n]R"]), &["tuple of arguments"]);
    for callable in [&b"N"[..], b"K\x01", b"}", b"X\0\0\0\0", &tensor] {
        bad("callable", &cat(&[callable, b")R"]), &["allowed global"]);
        bad("callable", &cat(&[callable, b")\x81"]), &["allowed global"]);
    }
    for named in [
        "torch.float32",
        "torch.FloatStorage",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "torch.Tensor",
    ] {
        bad(named, &call(named, b")"), &["not called"]);
    }

    for class in ["torch\nTensor", "torch\nFloatStorage", "torch.storage\nUntypedStorage", "torch\nfloat32"] {
        bad(class, &cat(&[format!("c{class}\n)").as_bytes(), b"\x81"]), &["NEWOBJ"]);
    }

    let v1 = |parts: &[&[u8]]| call("torch._utils._rebuild_tensor", &args(parts));
    accepted("v1", &pt(&dict(&v1(&good[..4]))));
    bad("v1", &v1(&good[..3]), &["needs (storage, offset, size, stride)"]);
    bad("v1", &v1(&good[..5]), &["needs (storage, offset, size, stride)"]);

    let untyped =
        |n: i64| cat(&[b"(", &s("storage"), b"ctorch.storage\nUntypedStorage\n", &s("0"), &s("cpu"), &int(n), b"tQ"]);
    let v3 = |dtype: &str, n: i64| {
        let dtype = format!("ctorch\n{dtype}\n");
        call(
            "torch._utils._rebuild_tensor_v3",
            &args(&[&untyped(n), &zero, &size, &stride, b"\x89", ORDERED, dtype.as_bytes()]),
        )
    };
    accepted("v3", &pt(&dict(&v3("float32", 16))));
    bad("v3", &v3("float64", 16), &["the storage has 2"]);
    bad("v3", &v3("float32", 15), &["record has 16"]);
    for dtype in ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "complex64", "qint8", "bits8"] {
        bad(dtype, &v3(dtype, 16), &[dtype]);
    }
    let needed = "needs (storage, offset, size, stride, requires_grad, hooks, dtype[, flags])";
    bad("v3 without dtype", &call("torch._utils._rebuild_tensor_v3", &args(&good)), &[needed]);
    bad(
        "v3 with a name",
        &call("torch._utils._rebuild_tensor_v3", &args(&[&good.concat(), &s("float32")])),
        &["needs ("],
    );

    let parameter = |parts: &[&[u8]]| call("torch._utils._rebuild_parameter", &args(parts));
    accepted("parameter", &pt(&dict(&parameter(&[&tensor, b"\x88", ORDERED]))));
    for parts in [
        &[&tensor[..]][..],
        &[&tensor, b"\x88"],
        &[&tensor, b"\x88", ORDERED, b"}"],
        &[b"N", b"\x88", ORDERED],
        &[&tensor, b"K\x01", ORDERED],
        &[&st, b"\x88", ORDERED],
    ] {
        bad("parameter", &parameter(parts), &["needs ("]);
    }
    let with_state = |parts: &[&[u8]]| call("torch._utils._rebuild_parameter_with_state", &args(parts));
    accepted("state", &pt(&dict(&with_state(&[&tensor, b"\x88", ORDERED, b"}"]))));
    accepted("state", &pt(&dict(&with_state(&[&tensor, b"\x88", ORDERED, b"N}\x86"]))));
    for parts in [
        &[&tensor[..], b"\x88", ORDERED][..],
        &[&tensor, b"\x88", ORDERED, b"K\x01"],
        &[&tensor, b"\x88", ORDERED, b"}\x85"],
        &[&tensor, b"\x88", ORDERED, b"K\x01}\x86"],
    ] {
        bad("state", &with_state(parts), &["needs "]);
    }
    let from_type = |parts: &[&[u8]]| call("torch._tensor._rebuild_from_type_v2", &args(parts));
    let inner = args(&good);
    let function: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n";
    for class in [&b"ctorch\nTensor\n"[..], b"ctorch.nn.parameter\nParameter\n", b"ctorch.nn.parameter\nBuffer\n"] {
        accepted("from type", &pt(&dict(&from_type(&[function, class, &inner, b"}"]))));
    }
    bad("from type", &from_type(&[function, b"ctorch\nTensor\n", &inner]), &["needs ("]);
    bad("from type", &from_type(&[function, b"ctorch\nSize\n", &inner, b"}"]), &["needs ("]);
    bad("from type", &from_type(&[b"ctorch\nSize\n", b"ctorch\nTensor\n", &inner, b"}"]), &["needs ("]);
    bad("from type", &from_type(&[function, b"ctorch\nTensor\n", b")", b"}"]), &["needs ("]);
    bad(
        "from type of itself",
        &from_type(&[b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nTensor\n", &inner, b"}"]),
        &["needs ("],
    );
    for class in ["Parameter", "Buffer"] {
        let class = format!("ctorch.nn.parameter\n{class}\n");
        accepted("class", &pt(&dict(&cat(&[class.as_bytes(), &tensor, b"\x88\x86R"]))));
        accepted("class", &pt(&dict(&cat(&[class.as_bytes(), &tensor, b"\x85\x81"]))));
        bad("class", &cat(&[class.as_bytes(), b")R"]), &["needs a tensor"]);
        bad("class", &cat(&[class.as_bytes(), b"N\x85\x81"]), &["needs a tensor"]);
    }

    for (global, arguments) in [
        ("collections.OrderedDict", &b"K\x01\x85"[..]),
        ("collections.OrderedDict", b"}}\x86"),
        ("collections.OrderedDict", b"]K\x01a\x85"),
        ("collections.OrderedDict", b"]K\x01\x85a\x85"),
        ("collections.Counter", b"K\x01\x85"),
        ("collections.Counter", b"]\x85"),
        ("torch.Size", b"K\x01\x85"),
        ("torch.Size", b"X\0\0\0\0\x85\x85"),
        ("torch.Size", b"))\x86"),
        ("torch.device", b")"),
        ("torch.device", b"N\x85"),
        ("torch.device", b"X\x03\0\0\0cpuN\x86"),
        ("torch.device", b"X\x03\0\0\0cpuK\0K\0\x87"),
        ("_codecs.encode", b")"),
        ("_codecs.encode", b"X\x03\0\0\0cpu\x85"),
        ("_codecs.encode", b"X\x03\0\0\0cpuX\x03\0\0\0hex\x86"),
        ("_codecs.encode", b"X\x03\0\0\0cpuN\x86"),
        ("_codecs.encode", b"X\x03\0\0\0\xe2\x82\xacX\x06\0\0\0latin1\x86"),
        ("builtins.set", b"K\x01\x85"),
        ("builtins.set", b"]]\x86"),
        ("builtins.bytearray", b"K\x01\x85"),
        ("builtins.bytearray", b"J\xff\xff\xff\x7f\x85"),
        ("builtins.bytearray", b"X\x03\0\0\0\xe2\x82\xacX\x07\0\0\0latin-1\x86"),
        ("builtins.bytearray", b"X\x03\0\0\0cpuX\x03\0\0\0hex\x86"),
        ("builtins.complex", b")"),
        ("builtins.complex", b"X\x01\0\0\x001\x85"),
        ("builtins.complex", b"NN\x86"),
    ] {
        bad(global, &call(global, arguments), &["needs "]);
    }
    let device = |name: &str| call("torch.device", &cat(&[&s(name), b"\x85"]));
    value(&device(&"x".repeat(64)), |v| assert!(format!("{v:?}").contains("xxx")));
    bad("device", &device(&"x".repeat(65)), &["a device's name of 65 bytes; the limit is 64"]);
    bad("set of lists", &call("builtins.set", b"]]a\x85"), &["cannot be a key"]);
    for class in ["OrderedDict", "Counter"] {
        bad(class, &cat(&[format!("ccollections\n{class}\n").as_bytes(), b"}\x85\x81"]), &["NEWOBJ"]);
    }
    bad("NEWOBJ of a function", &cat(&[function, &inner, b"\x81"]), &["NEWOBJ"]);
    bad("NEWOBJ_EX with keywords", b"ccollections\nOrderedDict\n)}K\x01K\x02s\x92", &["keyword"]);
    bad("NEWOBJ_EX with None", b"ccollections\nOrderedDict\n)N\x92", &["keyword"]);
}

#[test]
fn persistent_ids() {
    let id = |parts: &[&[u8]]| cat(&[b"(", &parts.concat(), b"tQ"]);
    let (tag, class, key, cpu, n) = (s("storage"), b"ctorch\nFloatStorage\n", s("0"), s("cpu"), int(4));
    let good: [&[u8]; 5] = [&tag, class, &key, &cpu, &n];
    let with = |at: usize, part: &[u8]| {
        let mut parts = good;
        parts[at] = part;
        id(&parts)
    };
    value(&id(&good), |v| assert!(matches!(v, Value::Opaque("a storage"))));
    value(&with(3, &s("cuda:0")), |v| assert!(matches!(v, Value::Opaque("a storage"))));
    bad("tag", &with(0, &s("module")), &["storage"]);
    value(&with(3, b"N"), |v| assert!(matches!(v, Value::Opaque("a storage"))));
    for at in [0, 1, 2, 4] {
        bad("kind", &with(at, b"N"), &["persistent id", "64 bits"]);
        bad("kind", &with(at, b"]"), &["persistent id", "64 bits"]);
    }
    bad("short", &id(&good[..4]), &["persistent id"]);
    bad("long", &id(&[&good.concat(), b"N"]), &["persistent id"]);
    bad("no tuple", b"NQ", &["persistent id"]);
    bad("class", &with(1, b"ctorch\nfloat32\n"), &["class of a storage"]);
    bad("class", &with(1, b"ctorch.storage\nTypedStorage\n"), &["class of a storage"]);
    bad("class", &with(1, b"ccollections\nOrderedDict\n"), &["class of a storage"]);
    for class in [
        "ComplexFloatStorage",
        "ComplexDoubleStorage",
        "QInt8Storage",
        "QUInt8Storage",
        "QInt32Storage",
        "QUInt4x2Storage",
    ] {
        bad(class, &with(1, format!("ctorch\n{class}\n").as_bytes()), &[class]);
    }
    for key in ["1", "", "00", "../data/0", "0/", "../../a/data/0", "0\0", "data/0"] {
        bad("key", &with(2, &s(key)), &["no record"]);
    }
    for count in [-1, 0, 3, 5, i64::MAX, i64::MIN, 1 << 62] {
        bad("count", &with(4, &int(count)), &["record has 16"]);
    }
    bad("count of 80 bits", &with(4, b"\x8a\x0a\x04\0\0\0\0\0\0\0\0\x01"), &["64 bits"]);
    bad("count as a float", &with(4, b"G\x40\x10\0\0\0\0\0\0"), &["64 bits"]);
    bad("count as a bool", &with(4, b"\x88"), &["64 bits"]);
    let two = cat(&[&storage("FloatStorage", "0", 4), b"0", &storage("IntStorage", "0", 4)]);
    bad("two classes", &two, &["two classes"]);
    let mut all = records(&dict(&w()));
    all.remove(2);
    refused("no record", &zip(&all, |_| {}), &["no record"]);
    all.push(record("a/data/0/", b""));
    refused("a folder", &zip(&all, |_| {}), &["no record"]);
}

#[test]
fn views_stay_inside() {
    let view =
        |offset: i64, size: &[i64], stride: &[i64]| rebuild(&storage("FloatStorage", "0", 4), offset, size, stride);
    for (offset, size, stride) in [
        (1, &[4][..], &[1][..]),
        (4, &[1], &[1]),
        (4, &[], &[]),
        (0, &[2, 2], &[3, 1]),
        (0, &[2], &[4]),
        (0, &[2], &[i64::MAX]),
        (i64::MAX, &[2], &[i64::MAX]),
        (i64::MAX, &[1], &[1]),
        (0, &[i64::MAX], &[1]),
        (0, &[3, 3], &[i64::MAX, i64::MAX]),
    ] {
        bad("outside", &view(offset, size, stride), &["the storage has 4", "overflows"]);
    }
    for (offset, size, stride) in [(-1, &[1][..], &[1][..]), (0, &[-1], &[1]), (0, &[1], &[-1]), (0, &[2], &[i64::MIN])]
    {
        bad("negative", &view(offset, size, stride), &["negative"]);
    }
    let far = open(&dict(&view(i64::MAX, &[0], &[1]))).and_then(|mut pt| pt.crc32(&pt.tensors()[0].tensor.clone()));
    assert_eq!(far.unwrap(), 0, "an empty view may begin anywhere");
    bad("ranks", &view(0, &[1], &[]), &["strides"]);
    bad("ranks", &view(0, &[], &[1]), &["strides"]);
    bad("65 dimensions", &view(0, &[1; 65], &[1; 65]), &["limit is 64"]);
    bad("wide number", &rebuild(&storage("FloatStorage", "0", 4), 0, &[], &[]).replace_offset(), &["64 bits"]);
    for size in [
        &[1 << 40][..],
        &[1 << 32, 1 << 32, 1 << 32],
        &[1 << 31, 1 << 31],
        &[i64::MAX, 2],
        &[i64::MAX, i64::MAX, i64::MAX],
        &[1 << 25],
    ] {
        bad("expanded", &view(0, size, &vec![0; size.len()]), &["expanded", "overflows"]);
    }
    let shape = |offset: i64, size: &[i64], stride: &[i64]| {
        let mut pt = open(&dict(&view(offset, size, stride))).unwrap();
        let tensor = pt.find(&["w".into()]).unwrap();
        pt.read(&tensor).unwrap()
    };
    assert_eq!(shape(0, &[1; 64], &[1; 64]).shape(), [1; 64]);
    assert_eq!(shape(0, &[2, 2], &[1, 2]).strides(), [1, 2]);
    assert_eq!(shape(0, &[2, 2], &[1, 2]).to_f64_vec(), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(shape(1, &[2], &[2]).to_f64_vec(), [2.0, 4.0]);
    assert_eq!(shape(3, &[], &[]).to_f64_vec(), [4.0]);
    assert_eq!(shape(2, &[3, 2], &[0, 1]).to_f64_vec(), [3.0, 4.0, 3.0, 4.0, 3.0, 4.0]);
    assert_eq!(shape(0, &[3, 2], &[1, 1]).to_f64_vec(), [1.0, 2.0, 2.0, 3.0, 3.0, 4.0]);
    assert_eq!(shape(0, &[1, 4], &[i64::MAX, 1]).to_f64_vec(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(shape(0, &[0], &[1]).shape(), [0]);
    assert_eq!(shape(9, &[0, i64::MAX], &[i64::MAX, 1]).len(), 0);
    // Rows of views.
    let mut pt = open(&dict(&view(0, &[2, 2], &[1, 2]))).unwrap();
    let tensor = pt.find(&["w".into()]).unwrap();
    assert_eq!(pt.read_rows(&tensor, 1..2).unwrap().to_f64_vec(), [2.0, 4.0]);
    assert_eq!(pt.read_rows(&tensor, 0..2).unwrap().to_f64_vec(), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(pt.read_rows(&tensor, 2..2).unwrap().shape(), [0, 2]);
    assert!(pt.read_rows(&tensor, 1..3).is_err());
    assert!(shape(3, &[], &[]).shape().is_empty());
}

trait WideOffset {
    fn replace_offset(self) -> Vec<u8>;
}

impl WideOffset for Vec<u8> {
    /// The offset 0 as the integer 2^64.
    fn replace_offset(self) -> Vec<u8> {
        let zero = int(0);
        let at = self.windows(zero.len()).position(|w| w == zero).unwrap();
        let wide: &[u8] = b"\x8a\x09\0\0\0\0\0\0\0\0\x01";
        [&self[..at], wide, &self[at + zero.len()..]].concat()
    }
}

#[test]
fn keys_of_every_kind_are_spelled() {
    let half = [&b"G"[..], &1.5f64.to_be_bytes()].concat();
    let entries: [(&[u8], &str); 10] = [
        (b"N", "None"),
        (b"\x88", "True"),
        (b"\x89", "False"),
        (&half, "1.5"),
        (b"\x8a\x09\0\0\0\0\0\0\0\0\x01", "18446744073709551616"),
        (b"C\x02a\xff", "b'a\\xff'"),
        (b"ctorch\nfloat16\n", "float16"),
        (b"ctorch\ndevice\nX\x03\0\0\0cpu\x85R", "torch.device(\"cpu\")"),
        (b"K\x07\x85", "(7,)"),
        (b"X\x01\0\0\0aN\x88\x87", "('a', None, True)"),
    ];
    for (key, spelling) in entries {
        let file = open(&root(&cat(&[b"}", key, &w(), b"s"]))).unwrap();
        assert_eq!(file.tensors()[0].path, [PathPart::from(spelling)]);
    }
    // All in one dict: they differ.
    let all: Vec<u8> = entries.iter().flat_map(|(key, _)| [key, &w()[..]].concat()).collect();
    let file = open(&root(&cat(&[b"}(", &all, b"u"]))).unwrap();
    let paths: Vec<_> = file.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(paths, entries.map(|(_, spelling)| spelling));
    // Of long ones the beginning is.
    let nested =
        cat(&[b"(", &s(&"x".repeat(1000)), b"q\0", &b"h\0".repeat(15), b"tq\x010(", &b"h\x01".repeat(16), b"t"]);
    let file = open(&root(&cat(&[b"}", &nested, &w(), b"s"]))).unwrap();
    let [PathPart::Key(key)] = &file.tensors()[0].path[..] else { panic!("no key") };
    assert!(key.starts_with("(('xxx") && key.ends_with("'))") && key.len() < 1500, "{key}");
    // 33 bytes are too long to be spelled.
    let file = open(&root(&cat(&[b"}\x8a\x21", &[1; 33], &w(), b"s"]))).unwrap();
    assert_eq!(file.tensors()[0].path, [PathPart::from("an int")]);
}

#[test]
fn what_a_refused_name_stands_for_is_said() {
    bad("sparse", b"ctorch._utils\n_rebuild_sparse_tensor\n", &["(a sparse tensor)"]);
    bad("meta", b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n", &["(a meta tensor, without data)"]);
    bad("quantized", b"ctorch._utils\n_rebuild_qtensor\n", &["(a quantized tensor)"]);
    bad("TorchScript", b"c__torch__.nets\nNet\n", &["(a TorchScript class)"]);
    bad("another", b"cnets\nNet\n", &["global 'nets.Net' is not allowed"]);
}

#[test]
fn containers_say_how_many_they_hold() {
    value(b"](K\x01K\x02K\x03e", |list| {
        let Value::List(items) = list else { panic!("{list:?}") };
        assert_eq!((items.len(), items.is_empty(), format!("{items:?}").as_str()), (3, false, "[3 items]"));
    });
    value(b"}(K\x01NK\x02Nu", |dict| {
        let Value::Dict(entries) = dict else { panic!("{dict:?}") };
        assert_eq!((entries.len(), entries.is_empty(), format!("{entries:?}").as_str()), (2, false, "{2 entries}"));
    });
    value(b"]", |list| assert!(matches!(list, Value::List(items) if items.is_empty())));
    value(b"}", |dict| assert!(matches!(dict, Value::Dict(entries) if entries.is_empty())));
}

#[test]
fn values_answer_for_what_they_are() {
    type Answers<'a> = (Option<i64>, Option<f64>, Option<bool>, Option<&'a str>, bool, usize, usize);
    let answers = |v: Value<'_>, expected: Answers<'_>| {
        let (items, entries) = (v.items().count(), v.entries().count());
        let found = (v.as_i64(), v.as_f64(), v.as_bool(), v.as_str(), v.as_tensor().is_some(), items, entries);
        assert_eq!(found, expected, "{v:?}");
        assert_eq!(v.get("k").is_some(), entries > 0);
    };
    value(b"N", |v| answers(v, (None, None, None, None, false, 0, 0)));
    value(b"\x88", |v| answers(v, (None, None, Some(true), None, false, 0, 0)));
    value(b"K\x07", |v| answers(v, (Some(7), Some(7.0), None, None, false, 0, 0)));
    value(b"G\x3f\xf8\0\0\0\0\0\0", |v| answers(v, (None, Some(1.5), None, None, false, 0, 0)));
    value(&s("seven"), |v| answers(v, (None, None, None, Some("seven"), false, 0, 0)));
    value(b"K\x07K\x08\x86", |v| answers(v, (None, None, None, None, false, 2, 0)));
    value(b"\x8f(K\x01\x90", |v| answers(v, (None, None, None, None, false, 1, 0)));
    value(&cat(&[b"}", &s("k"), b"Ns"]), |v| answers(v, (None, None, None, None, false, 0, 1)));
    value(&w(), |v| answers(v, (None, None, None, None, true, 0, 0)));
    // Beyond 64 bits it is neither an integer of these nor a float.
    value(b"\x8a\x09\0\0\0\0\0\0\0\x80\0", |v| {
        answers(v, (None, None, None, None, false, 0, 0));
        assert!(matches!(v, Value::Big(n) if n.le_bytes() == [0, 0, 0, 0, 0, 0, 0, 0x80, 0]));
    });
}

/// What was written before is referred to by its number, in one byte or in four.
#[test]
fn strings_are_written_once_as_by_python() {
    let texts = || (0..300).map(|i| format!("{i:03}"));
    let all = texts().chain(["000", "254", "255", "299"].map(str::to_owned)).map(Save::Str).collect();
    let file = Writer::new(Vec::new(), "a").unwrap().save(&Save::List(all)).unwrap();
    // The list is number 0.
    let once: Vec<u8> = (1u32..)
        .zip(texts())
        .flat_map(|(n, text)| match u8::try_from(n) {
            Ok(n) => cat(&[&s(&text), &[b'q', n]]),
            Err(_) => cat(&[&s(&text), b"r", &n.to_le_bytes()]),
        })
        .collect();
    let pickle = cat(&[b"\x80\x02]q\0(", &once, b"h\x01h\xffj\0\x01\0\0j\x2c\x01\0\0e."]);
    assert!(file.windows(pickle.len()).any(|w| w == pickle));
    let read = PtFile::new(Cursor::new(file)).unwrap();
    let found: Vec<_> = read.root().items().filter_map(|v| v.as_str()).collect();
    assert_eq!((found.len(), &found[300..]), (304, &["000", "254", "255", "299"][..]));
}

/// As CPython's pickler writes them in protocol 2.
#[test]
fn integers_are_written_as_by_python() {
    let cases: [(i64, &[u8]); 11] = [
        (255, b"K\xff"),
        (256, b"M\0\x01"),
        (65535, b"M\xff\xff"),
        (65536, b"J\0\0\x01\0"),
        (-1, b"J\xff\xff\xff\xff"),
        ((1 << 31) - 1, b"J\xff\xff\xff\x7f"),
        (1 << 31, b"\x8a\x05\0\0\0\x80\0"),
        (-(1 << 31) - 1, b"\x8a\x05\xff\xff\xff\x7f\xff"),
        (-(1 << 39), b"\x8a\x05\0\0\0\0\x80"),
        (i64::MAX, b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (i64::MIN, b"\x8a\x08\0\0\0\0\0\0\0\x80"),
    ];
    for (n, code) in cases {
        let file = Writer::new(Vec::new(), "a").unwrap().save(&Save::Int(n)).unwrap();
        let pickle = cat(&[b"\x80\x02", code, b"."]);
        assert!(file.windows(pickle.len()).any(|w| w == pickle), "{n}");
    }
}

/// Many views of one record that has to be unpacked for each.
#[test]
fn work_far_beyond_the_file_is_refused() {
    const BYTES: usize = 4 << 20;
    let views: Vec<Vec<u8>> = (0..80)
        .map(|i| {
            cat(&[&s(&format!("{i}")), &rebuild(&storage("FloatStorage", "0", (BYTES / 4) as i64), i, &[4], &[1])])
        })
        .collect();
    let pickle = root(&cat(&[b"}(", &views.concat(), b"u"]));
    let path = std::env::temp_dir().join(format!("crosscoder-work-{}.pt", std::process::id()));
    let checksums = |data: Record| {
        std::fs::write(&path, zip(&[record("a/data.pkl", &pickle), data], |_| {})).unwrap();
        let mut file = TensorFile::open(&path).unwrap();
        (0..80).map(|i| file.crc32(i)).collect::<crosscoder::Result<Vec<_>>>()
    };
    let data = record("a/data/0", &vec![0; BYTES]);
    assert_eq!(checksums(data.clone()).unwrap().len(), 80);
    let refused = checksums(data.deflated()).unwrap_err();
    assert!(refused.to_string().contains("and all records together have"), "{refused}");
    std::fs::remove_file(path).unwrap();
}

/// The same for a checkpoint with a tensor for each model: one storage, which many names stand for.
#[test]
fn one_storage_under_a_thousand_names_is_not_read_a_thousand_times() {
    const D: i64 = 512;
    let weight = rebuild(&storage("FloatStorage", "0", D * D), 0, &[D, D], &[D, 1]);
    let file = |models: usize| {
        let names = (0..models).flat_map(|m| [cat(&[&s(&format!("W_enc_{m}")), &weight])]).collect::<Vec<_>>();
        zip(
            &[
                record("a/data.pkl", &root(&cat(&[b"}(", &names.concat(), b"u"]))),
                record("a/data/0", &vec![0; 4 << 18]),
            ],
            |_| {},
        )
    };
    let path = std::env::temp_dir().join(format!("crosscoder-names-{}.pt", std::process::id()));
    let read = |models| {
        std::fs::write(&path, file(models)).unwrap();
        let mut file = TensorFile::open(&path).unwrap();
        crosscoder::layouts::read(&mut file, Config::default(), "cfg.json".as_ref()).unwrap_err().to_string()
    };
    // What is missing is only looked for after all of these have been read.
    assert!(read(20).contains("W_dec is there as []"), "{}", read(20));
    assert!(read(1000).contains("and all records together have"), "{}", read(1000));
    // Nor by `convert`, which keeps tensors of any name.
    #[cfg(feature = "cli")]
    {
        let out = path.with_extension("safetensors");
        assert_convert_refuses_the_work(&path, &out, &file(20));
        std::fs::remove_file(out).unwrap();
    }
    std::fs::remove_file(path).unwrap();
}

/// What has no path to it, or holds nothing, is told as one thing; and what could act on a terminal is escaped.
#[test]
fn what_is_beside_the_tensors_is_told() {
    let red = s("\u{9b}31m\u{7f}\u{202e}\"\\\n");
    let pickle = cat(&[
        &[b"}(", &s("t")[..], &w(), &s("s"), b"\x8f(K\x01K\x02\x90", &s("f"), b"(\x91"].concat(),
        &[&s("e")[..], b"}", &s("l"), b"]", &s("u"), b")", &s("o"), ORDERED, &s("n"), b"}", &s("x"), b"]s"].concat(),
        &[&s("c")[..], &red, &red, b"N", b"u"].concat(),
    ]);
    let path = std::env::temp_dir().join(format!("crosscoder-told-{}.pt", std::process::id()));
    std::fs::write(&path, pt(&root(&pickle))).unwrap();
    let told = |style| {
        let mut out = Vec::new();
        info(&path, style, false, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    let text = told(Style::Text);
    let lines: Vec<&str> = text.lines().skip(2).collect();
    assert_eq!(
        lines,
        [
            "s\ta set of 2",
            "f\tan empty set",
            "e\tan empty dict",
            "l\tan empty list",
            "u\tan empty tuple",
            "o\tan empty dict",
            "n.x\tan empty list",
            r#"c	"\u009b31m\u007f\u202e\"\\\n""#,
            r#"\u{9b}31m\u{7f}\u{202e}"\\n	null"#,
        ]
    );
    let json = told(Style::Json);
    assert!(json.contains(r#"{"path":["s"],"what":"a set of 2"},{"path":["f"],"what":"an empty set"}"#), "{json}");
    assert!(
        json.contains(r#""values":[{"path":["c"],"value":"\u009b31m\u007f\u202e\"\\\n"},{"path":["\u009b31m"#),
        "{json}"
    );
    #[cfg(feature = "cli")]
    {
        let out = path.with_extension("safetensors");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_crosscoder"));
        let output = command.arg("convert").args([&path, &out]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said, "plain values left out: s, f, e, l, u, o, n.x, c, \\u{9b}31m\\u{7f}\\u{202e}\"\\\\n\n");
        std::fs::remove_file(out).unwrap();
    }
    std::fs::remove_file(path).unwrap();
}

/// `convert` refuses the file at `path` for the work that it makes, and does what is asked with `less` in its place.
#[cfg(feature = "cli")]
fn assert_convert_refuses_the_work(path: &std::path::Path, out: &std::path::Path, less: &[u8]) {
    let convert = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_crosscoder"));
        let output = command.arg("convert").args([path, out]).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, said) = convert();
    assert!(code == Some(1) && said.contains("and all records together have"), "{code:?} {said}");
    assert!(!out.exists());
    std::fs::write(path, less).unwrap();
    assert_eq!(convert(), (Some(0), String::new()));
}

/// Each view is within the limit of one; all of them are not.
#[test]
fn views_are_not_expanded_far_beyond_the_file() {
    let view = rebuild(&storage("FloatStorage", "0", 4), 0, &[16 << 20], &[0]);
    let file = |views: usize| {
        let views: Vec<Vec<u8>> = (0..views).map(|i| cat(&[&s(&format!("{i}")), &view])).collect();
        pt(&root(&cat(&[b"}(", &views.concat(), b"u"])))
    };
    let folder = std::env::temp_dir().join(format!("crosscoder-views-{}", std::process::id()));
    let path = folder.join("version_0/resume.pt");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, file(12)).unwrap();
    let mut open = TensorFile::open(&path).unwrap();
    let refused = (0..12).find_map(|i| open.read_of_all(i).err().map(|e| (i, e.to_string())));
    let (at, said) = refused.unwrap();
    assert!(
        at == 4 && said.contains("resume.pt: 4: ") && said.contains("and all records together have"),
        "{at} {said}"
    );
    assert!(open.read(11).is_ok(), "whoever reads one tensor gets it");
    let said = crosscoder::run::Run::resume(&folder).unwrap_err().to_string();
    assert!(said.contains("and all records together have"), "{said}");
    #[cfg(feature = "cli")]
    {
        let out = folder.join("out.safetensors");
        assert_convert_refuses_the_work(&path, &out, &file(2));
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn no_changed_pickle_panics() {
    let pickle = cat(&[
        b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94(",
        &s("a"),
        b"\x94",
        &w(),
        b"\x94",
        &s("b"),
        b"h\x02",
        &s("c"),
        b"](K\x01M\x01\x02J\x01\x02\x03\x04eh\x00",
        ORDERED,
        &s("k"),
        b"\x8f(K\x01\x90s}",
        &s("_metadata"),
        b"Nsb",
        b"0u.",
    ]);
    for at in 0..pickle.len() {
        for byte in 0..=255u8 {
            let mut bad = pickle.clone();
            bad[at] = byte;
            let _ = read_all(&pt(&bad));
        }
        let _ = read_all(&pt(&[&pickle[..at], &pickle[at + 1..]].concat()));
        let _ = read_all(&pt(&[&pickle[..at], b"(", &pickle[at..]].concat()));
    }
}
