//! Whole files: the corpora, what torch.save writes and we write, rows, and files that change.

mod common;
use common::crc32;
use crosscoder::activations::Activations;
use crosscoder::checkpoint;
use crosscoder::files::{Format, TensorFile};
use crosscoder::info::{self, Style};
use crosscoder::npy::{self, NpyFile};
use crosscoder::pt::{self, PathPart, PtFile, Save, TensorSource, Writer};
use crosscoder::report::TrainingLog;
use crosscoder::safetensors::{self, SafetensorsFile};
use crosscoder::tensor::Values;
use crosscoder::{CrossCoder, Dtype, Result, Tensor};
use serde_json::Value as Json;
use std::io::Cursor;
use std::path::{Path, PathBuf};

fn info(path: &Path, style: Style, checksums: bool) -> Result<String> {
    let mut out = Vec::new();
    info::info(path, style, checksums, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Judges one folder by its manifest, as `expect` in its README says.
fn judge(folder: &str) {
    let manifest = std::fs::read_to_string(fixture(folder).join("manifest.json")).unwrap();
    let manifest: Json = serde_json::from_str(&manifest).unwrap();
    let cases = manifest["cases"].as_array().unwrap();
    let expected = |what: &str| cases.iter().filter(|case| case["expect"] == what).count();
    let [good, bad, either] = ["accept", "reject", "either"].map(expected);
    assert!(good > 10 && bad > 10 && good + bad + either == cases.len());
    for case in cases {
        let name = case["file"].as_str().unwrap();
        let answer = info(&fixture(folder).join(name), Style::Json, true);
        match (case["expect"].as_str().unwrap(), answer) {
            ("reject", Ok(answer)) => panic!("{name} is accepted: {answer}"),
            ("accept", Err(e)) => panic!("{name} is refused: {e}"),
            ("either", Err(_)) => {}
            (_, Err(e)) => {
                let text = e.to_string().to_lowercase();
                assert!(text.contains(name), "{name}: the message does not name it: {text}");
                if let Some(words) = case["say"].as_array() {
                    let said = words.iter().any(|w| text.contains(&w.as_str().unwrap().to_lowercase()));
                    assert!(said, "{name}: {text:?} has none of {words:?}");
                }
            }
            (_, Ok(answer)) => {
                let answer: Json = serde_json::from_str(&answer).unwrap();
                let keys = ["path", "dtype", "shape", "crc32"];
                let facts = |t: &Json| keys.map(|k| t[k].to_string()).join(" ");
                let sorted = |list: &Json| {
                    let mut facts: Vec<String> = list.as_array().unwrap().iter().map(facts).collect();
                    facts.sort();
                    facts
                };
                if case["tensors"].is_array() {
                    assert_eq!(sorted(&answer["tensors"]), sorted(&case["tensors"]), "{name}");
                }
                for value in case["values"].as_array().unwrap_or(&vec![]) {
                    let found = answer["values"].as_array().unwrap().iter().find(|v| v["path"] == value["path"]);
                    assert_eq!(found.map(|v| &v["value"]), Some(&value["value"]), "{name}: {}", value["path"]);
                }
            }
        }
    }
}

#[test]
fn checkpoint_corpus() {
    judge("pt-corpus");
}

#[test]
fn activation_corpus() {
    judge("act-corpus");
}

/// The values `start`, `start` + 1, … divided by 8, in this type.
fn eighths(dtype: Dtype, start: usize, count: usize) -> Values {
    Values::F32((start..start + count).map(|i| i as f32 / 8.0).collect()).cast(dtype).unwrap()
}

fn constant(dtype: Dtype, value: f32, shape: &[usize]) -> Tensor {
    let count = shape.iter().product();
    Tensor::new(shape.to_vec(), Values::F32(vec![value; count]).cast(dtype).unwrap()).unwrap()
}

/// The parameters that `fixtures/pt/make.py` makes.
fn crosscoder(dtype: Dtype) -> [(&'static str, Tensor); 4] {
    let (d_in, d_hidden) = (3, 5);
    let w = eighths(dtype, 0, 30);
    [
        ("W_enc", Tensor::with_strides(vec![2, d_in, d_hidden], vec![d_in, 1, 2 * d_in], w.clone()).unwrap()),
        ("W_dec", Tensor::new(vec![d_hidden, 2, d_in], w).unwrap()),
        ("b_enc", constant(dtype, 0.0, &[d_hidden])),
        ("b_dec", constant(dtype, -0.5, &[2, d_in])),
    ]
}

#[track_caller]
fn same_bytes(name: &str, ours: &[u8]) {
    let theirs = std::fs::read(fixture("pt").join(name)).unwrap();
    let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!((differs, ours.len()), (None, theirs.len()), "{name}");
}

fn save_state_dict(folder: &str, tensors: &[(&str, Tensor)]) -> Vec<u8> {
    let list: Vec<(&str, &dyn TensorSource)> = tensors.iter().map(|(n, t)| (*n, t as &dyn TensorSource)).collect();
    pt::write_state_dict(Vec::new(), folder, &list).unwrap()
}

#[test]
fn state_dicts_are_torch_saves_byte_for_byte() {
    same_bytes("0.pt", &save_state_dict("0", &crosscoder(Dtype::F32)));
    let folder = Writer::<Vec<u8>>::folder_for(Path::new("runs/cc_weights.v2.pt"));
    same_bytes("cc_weights.v2.pt", &save_state_dict(&folder, &crosscoder(Dtype::BF16)));
    for (path, folder) in [
        ("a/x.pt", "x"),
        ("x", "x"),
        (".pt", "archive"),
        ("...pt", "archive"),
        ("é.pt", "archive"),
        ("/", "archive"),
        ("a.b", "a"),
    ] {
        assert_eq!(Writer::<Vec<u8>>::folder_for(Path::new(path)), folder);
    }
}

#[test]
fn nested_values_are_torch_saves_byte_for_byte() {
    let tensors: Vec<(String, Tensor)> =
        (0..150).map(|i| (format!("layer{i}"), constant(Dtype::F32, i as f32, &[2]))).collect();
    let entries = tensors.iter().map(|(n, t)| (PathPart::from(n.as_str()), Save::Tensor(t))).collect();
    same_bytes("many.pt", &Writer::new(Vec::new(), "many").unwrap().save(&Save::Dict(entries)).unwrap());

    let range = Tensor::new(vec![3], Values::I64(vec![0, 1, 2])).unwrap();
    let scalar = Tensor::new(vec![], Values::F64(vec![2.5])).unwrap();
    let nothing = Tensor::new(vec![0, 4], Values::F32(vec![])).unwrap();
    let flags = Tensor::new(vec![2], Values::Bool(vec![true, false])).unwrap();
    let ints = |list: &[i64]| list.iter().map(|&n| Save::Int(n)).collect::<Vec<_>>();
    let root = Save::Dict(vec![
        ("step".into(), Save::Int(3)),
        ("big".into(), Save::Int(1 << 40)),
        ("neg".into(), Save::Int(-70000)),
        ("small".into(), Save::Int(-1)),
        ("word".into(), Save::Int(65535)),
        ("lr".into(), Save::Float(5e-5)),
        ("name".into(), Save::Str("é".into())),
        ("done".into(), Save::Bool(false)),
        ("yes".into(), Save::Bool(true)),
        ("note".into(), Save::None),
        ("list".into(), Save::List(ints(&[1, 2, 3]))),
        ("one".into(), Save::List(ints(&[7]))),
        ("none".into(), Save::List(vec![])),
        ("pair".into(), Save::Tuple(vec![Save::Float(0.9), Save::Float(0.999)])),
        ("four".into(), Save::Tuple(ints(&[1, 2, 3, 4]))),
        ("unit".into(), Save::Tuple(ints(&[1]))),
        ("nil".into(), Save::Tuple(vec![])),
        ("empty".into(), Save::Dict(vec![])),
        (PathPart::Index(7), Save::Str("seven".into())),
        (
            "cfg".into(),
            Save::OrderedDict(vec![
                ("a".into(), Save::Int(1)),
                ("b".into(), Save::Dict(vec![("c".into(), Save::Tensor(&range))])),
            ]),
        ),
        ("scalar".into(), Save::Tensor(&scalar)),
        ("nothing".into(), Save::Tensor(&nothing)),
        ("flags".into(), Save::Tensor(&flags)),
    ]);
    let ours = Writer::new(Vec::new(), "values").unwrap().save(&root).unwrap();
    same_bytes("values.pt", &ours);

    let pt = PtFile::new(Cursor::new(ours)).unwrap();
    let value = pt.root();
    assert_eq!(value.get("lr").unwrap().as_f64(), Some(5e-5));
    assert_eq!(value.get("big").unwrap().as_i64(), Some(1 << 40));
    assert_eq!(value.get("name").unwrap().as_str(), Some("é"));
    assert_eq!(value.get("four").unwrap().items().count(), 4);
    assert!(value.get("cfg").unwrap().get("b").unwrap().get("c").unwrap().as_tensor().is_some());
    assert!(value.get("absent").is_none());
}

#[test]
fn batches_are_torch_saves_byte_for_byte() {
    let entries = |n: i64| (0..n).map(|i| (PathPart::Index(i), Save::None)).collect::<Vec<_>>();
    let root = Save::List(vec![
        Save::Dict(entries(1000)),
        Save::Dict(entries(1001)),
        Save::List(vec![Save::None; 1000]),
        Save::List(vec![Save::None; 1001]),
        Save::OrderedDict(entries(1000)),
        Save::OrderedDict(entries(1001)),
    ]);
    same_bytes("batches.pt", &Writer::new(Vec::new(), "batches").unwrap().save(&root).unwrap());
}

/// A tensor of this type in which no two bytes in a row repeat, as far as the type allows.
fn patterned(dtype: Dtype, shape: &[usize]) -> Tensor {
    let bytes: Vec<u8> =
        (0..shape.iter().product::<usize>() * dtype.size_bytes()).map(|i| (i * 37 % 251) as u8).collect();
    let bytes = if dtype == Dtype::Bool { bytes.iter().map(|b| b & 1).collect() } else { bytes };
    let mut values = Values::with_capacity(dtype, 0);
    values.push_le_bytes(&bytes);
    Tensor::new(shape.to_vec(), values).unwrap()
}

fn row_major(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![];
    tensor
        .row_major_le_bytes(|b| {
            bytes.extend_from_slice(b);
            Result::<()>::Ok(())
        })
        .unwrap();
    bytes
}

/// Every other read is interrupted by a signal; the others bring 1,000 bytes at most.
struct Interrupted(Cursor<Vec<u8>>, bool);

impl std::io::Read for Interrupted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.1 = !self.1;
        let n = buffer.len().min(1000);
        if self.1 { Err(std::io::ErrorKind::Interrupted.into()) } else { self.0.read(&mut buffer[..n]) }
    }
}

impl std::io::Seek for Interrupted {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

#[test]
fn signals_and_short_reads_change_nothing() {
    let interrupted = |bytes: Vec<u8>| Interrupted(Cursor::new(bytes), false);
    for shape in [&[7][..], &[70_001], &[3, 700_001]] {
        let tensor = patterned(Dtype::F32, shape);
        let mut file = PtFile::new(interrupted(save_state_dict("x", &[("t", tensor.clone())]))).unwrap();
        let found = file.find(&["t".into()]).unwrap();
        assert_eq!(file.read(&found).unwrap(), tensor);
        assert_eq!(file.crc32(&found).unwrap(), crc32(&row_major(&tensor)));
        let saved = safetensors::write(Vec::new(), &[("t", &tensor)], &[]).unwrap();
        let mut file = SafetensorsFile::new(interrupted(saved)).unwrap();
        assert_eq!(file.read(0).unwrap(), tensor);
        let mut file = NpyFile::new(interrupted(npy::write(Vec::new(), &tensor).unwrap())).unwrap();
        assert_eq!(file.read().unwrap(), tensor);
    }
}

#[test]
fn every_dtype_goes_round_in_every_format() {
    for dtype in Dtype::ALL {
        for shape in [&[][..], &[0], &[1], &[7], &[4, 3, 5], &[2, 0, 3], &[70_001]] {
            let tensor = patterned(dtype, shape);
            let what = format!("{dtype} {shape:?}");

            let saved = save_state_dict("x", &[("t", tensor.clone())]);
            let mut file = PtFile::new(Cursor::new(&saved)).unwrap();
            let found = file.find(&["t".into()]).unwrap();
            let back = file.read(&found).unwrap();
            assert_eq!(row_major(&back), row_major(&tensor), "{what}");
            assert_eq!(
                (back.shape(), back.strides(), back.dtype()),
                (tensor.shape(), tensor.strides(), dtype),
                "{what}"
            );
            assert_eq!(file.crc32(&found).unwrap(), crc32(&row_major(&tensor)), "{what}");
            assert_eq!(save_state_dict("x", &[("t", back)]), saved, "{what}: written anew");

            let metadata = vec![("format".to_string(), "pt \"\u{1}é".to_string())];
            let saved = safetensors::write(Vec::new(), &[("t", &tensor)], &metadata).unwrap();
            let mut file = SafetensorsFile::new(Cursor::new(&saved)).unwrap();
            assert_eq!(file.metadata(), metadata);
            let back = file.read(0).unwrap();
            assert_eq!((back.shape(), back.dtype()), (shape, dtype));
            assert_eq!(row_major(&back), row_major(&tensor), "{what}");
            assert_eq!(file.crc32(0).unwrap(), crc32(&row_major(&tensor)));

            let saved = npy::write(Vec::new(), &tensor).unwrap();
            let mut file = NpyFile::new(Cursor::new(&saved)).unwrap();
            let back = file.read().unwrap();
            assert_eq!((back.shape(), back.dtype()), (shape, dtype));
            assert_eq!(row_major(&back), row_major(&tensor), "{what}");
            assert_eq!(file.crc32().unwrap(), crc32(&row_major(&tensor)));
        }
    }
}

#[test]
fn strides_survive_where_the_format_has_them() {
    let [(_, w_enc), ..] = crosscoder(Dtype::F16);
    let saved = save_state_dict("x", &[("w", w_enc.clone())]);
    let mut file = PtFile::new(Cursor::new(&saved)).unwrap();
    let found = file.find(&["w".into()]).unwrap();
    assert_eq!(file.read(&found).unwrap(), w_enc);
    assert_eq!(file.crc32(&found).unwrap(), crc32(&row_major(&w_enc)));
    assert_eq!(file.read_rows(&found, 1..2).unwrap().to_f64_vec(), w_enc.to_f64_vec()[15..]);
    let saved = safetensors::write(Vec::new(), &[("w", &w_enc)], &[]).unwrap();
    let back = SafetensorsFile::new(Cursor::new(&saved)).unwrap().read(0).unwrap();
    assert_eq!((back.to_f64_vec(), back.strides()), (w_enc.to_f64_vec(), &[15, 5, 1][..]));
    let saved = npy::write(Vec::new(), &w_enc).unwrap();
    assert_eq!(NpyFile::new(Cursor::new(&saved)).unwrap().read().unwrap().to_f64_vec(), w_enc.to_f64_vec());
}

#[test]
fn rows_are_read_from_every_format() {
    let tensor = patterned(Dtype::F32, &[9, 2, 3]);
    let folder = std::env::temp_dir().join(format!("crosscoder-rows-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let files = [
        ("a.pt", save_state_dict("a", &[("acts", tensor.clone())])),
        ("a.safetensors", safetensors::write(Vec::new(), &[("acts", &tensor)], &[]).unwrap()),
        ("a.npy", npy::write(Vec::new(), &tensor).unwrap()),
        // Recognised by content where the name says nothing.
        ("nameless", npy::write(Vec::new(), &tensor).unwrap()),
    ];
    let formats = [Format::Pt, Format::Safetensors, Format::Npy, Format::Npy];
    for ((name, bytes), format) in files.into_iter().zip(formats) {
        let path = folder.join(name);
        std::fs::write(&path, &bytes).unwrap();
        let mut file = TensorFile::open(&path).unwrap();
        assert_eq!((file.format(), file.tensors().len()), (format, 1));
        assert_eq!(file.tensors()[0].shape, [9, 2, 3]);
        for (from, to) in [(0, 9), (0, 0), (9, 9), (3, 5), (8, 9)] {
            let rows = file.read_rows(0, from..to).unwrap();
            assert_eq!(rows.shape(), [to - from, 2, 3]);
            assert_eq!(row_major(&rows), row_major(&tensor)[from * 24..to * 24], "{name} {from}..{to}");
        }
        assert_eq!(file.read(0).unwrap(), tensor);
        assert_eq!(file.crc32(0).unwrap(), crc32(&row_major(&tensor)));
        #[allow(clippy::reversed_empty_ranges)]
        for bad in [0..10, 10..10, 5..4, usize::MAX..usize::MAX] {
            let e = file.read_rows(0, bad).unwrap_err().to_string();
            assert!(e.contains("rows") && e.contains(name), "{e}");
        }
        assert!(file.read(1).is_err());
        // The file shrinks under the reader, which has checked it: an error, no more.
        std::fs::write(&path, &bytes[..bytes.len() / 4]).unwrap();
        assert!(file.read(0).is_err());
        let claimed = folder.join(format!("{name}.pth"));
        std::fs::write(&claimed, &bytes).unwrap();
        assert_eq!(TensorFile::open(&claimed).is_ok(), format == Format::Pt);
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_file_is_opened_by_its_path_which_errors_name() {
    let path = fixture("pt/values.pt");
    let mut file = pt::open(&path).unwrap();
    let tensor = file.tensors()[0].tensor.clone();
    assert_eq!(file.read(&tensor).unwrap().shape(), tensor.shape);
    let error = |name: &str| pt::open(fixture(name)).unwrap_err().to_string();
    for (name, words) in
        [("pt", "a folder, not a file"), ("pt/none.pt", "cannot open"), ("make_layouts.py", "not a .pt file")]
    {
        let said = error(name);
        assert!(said.contains(words) && said.contains(name), "{said}");
    }
}

#[test]
fn rows_that_float32_cannot_hold_are_told() {
    let largest = f64::from(f32::MAX);
    let rows = |last: f64| {
        let values = Values::F64([vec![-largest; 11], vec![last]].concat());
        Activations::from_tensor("rows", Tensor::new(vec![3, 2, 2], values).unwrap()).unwrap()
    };
    let mut out = Vec::new();
    rows(largest).read_f32(0, 3, &mut out).unwrap();
    assert_eq!(out[10..], [f32::MIN, f32::MAX]);
    for (value, shown) in [(1e300, "1e300"), (-largest * 1.1, "-3.743105813"), (f64::NAN, "NaN is not finite")] {
        let said = rows(value).read_f32(1, 2, &mut out).unwrap_err().to_string();
        assert!(said.starts_with("rows, row 2: model B, element 1: ") && said.contains(shown), "{said}");
        assert_eq!(said.contains("finite in float32"), value.is_finite(), "{said}");
        assert!(rows(value).unchecked().read_f32(0, 3, &mut out).is_ok());
    }
}

#[test]
fn rows_in_fortran_order_are_refused_with_the_name_once() {
    let path = std::env::temp_dir().join(format!("crosscoder-fortran-{}.npy", std::process::id()));
    std::fs::write(&path, npy_file("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 2, 2)}", &[0; 48])).unwrap();
    let said = Activations::open(&[&path]).unwrap().read(0, 1, &mut Vec::new()).unwrap_err().to_string();
    assert_eq!(said, format!("{}: rows of an array in Fortran order; save it in C order", path.display()));
    std::fs::remove_file(path).unwrap();
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    let folder = std::env::temp_dir().join(format!("crosscoder-regular-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let [fifo, zeros, cfg] = ["fifo.pt", "zeros.npy", "0_cfg.json"].map(|name| folder.join(name));
    // Without a writer, opening this one would wait for ever.
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    std::os::unix::fs::symlink("/dev/zero", &zeros).unwrap();
    std::fs::copy(fixture("pt/0.pt"), folder.join("0.pt")).unwrap();
    for path in [&fifo, &zeros] {
        let refused = format!("{}: no regular file", path.display());
        let said = [
            info(path, Style::Text, true).unwrap_err(),
            Activations::open(&[path]).unwrap_err(),
            pt::open(path).unwrap_err(),
            TrainingLog::read(path).unwrap_err(),
            checkpoint::read_cfg(path).unwrap_err(),
        ];
        said.iter().for_each(|e| assert!(e.to_string().starts_with(&refused), "{e}"));
        let _ = std::fs::remove_file(&cfg);
        std::os::unix::fs::symlink(path, &cfg).unwrap();
        for checkpoint in [&folder, &folder.join("0.pt")] {
            let said = CrossCoder::load(checkpoint).unwrap_err().to_string();
            assert!(said.starts_with(&format!("{}: no regular file", cfg.display())), "{said}");
        }
    }
    std::fs::remove_file(&cfg).unwrap();
    let looped = folder.join("looped.pt");
    std::os::unix::fs::symlink("looped.pt", &looped).unwrap();
    let [looped, absent] = [looped, folder.join("absent.pt")].map(|p| CrossCoder::load(p).unwrap_err().to_string());
    assert!(looped.contains("looped.pt: cannot look at it: "), "{looped}");
    assert!(absent.contains("absent.pt: no such checkpoint: "), "{absent}");
    std::fs::File::create(&cfg).unwrap().set_len((1 << 20) + 1).unwrap();
    let said = CrossCoder::load(&folder).unwrap_err().to_string();
    assert!(said.contains("0_cfg.json: it has more bytes than the limit of 1048576"), "{said}");
    std::fs::remove_dir_all(&folder).unwrap();
}

/// A shard that cannot be read is refused: without its rows a set is another.
#[test]
fn no_shard_of_a_folder_is_left_out() {
    let folder = std::env::temp_dir().join(format!("crosscoder-shards-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("3.npy")).unwrap();
    let rows = npy::write(Vec::new(), &constant(Dtype::F32, 1.0, &[4, 2, 3])).unwrap();
    for name in ["1.npy", "2.NPY"] {
        std::fs::write(folder.join(name), &rows).unwrap();
    }
    std::fs::write(folder.join("notes.txt"), "").unwrap();
    assert_eq!(Activations::open(&[&folder]).unwrap().rows(), 8);
    let shard = folder.join("4.npy");
    std::os::unix::fs::symlink("absent.npy", &shard).unwrap();
    let said = Activations::open(&[&folder]).unwrap_err().to_string();
    assert!(said.starts_with(&format!("{}: cannot look at it: ", shard.display())), "{said}");
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn eight_readers_at_once() {
    let path = fixture("pt").join("many.pt");
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| info(&path, Style::Json, true).unwrap())).collect();
        let answers: Vec<String> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert!(answers.iter().all(|a| a == &answers[0] && a.contains("layer149")));
    });
}

#[test]
fn info_in_words() {
    let text = info(&fixture("pt").join("values.pt"), Style::Text, false).unwrap();
    assert!(text.contains("cfg.b.c\tint64\t[3]\tstrides [1]\n"), "{text}");
    assert!(text.contains("lr\t5e-5\n"), "{text}");
    let text = info(&fixture("act-corpus/ok_bf16_metadata.safetensors"), Style::Text, true).unwrap();
    assert!(text.contains("acts\tbfloat16\t[3, 2, 4]\tstrides [8, 4, 1]\tcrc32 "), "{text}");
    let json = info(&fixture("pt").join("0.pt"), Style::Json, false).unwrap();
    assert!(!json.contains("crc32") && json.contains("\"strides\":[3,1,6]"), "{json}");
    let e = info(Path::new("no/such/file.pt"), Style::Text, true).unwrap_err().to_string();
    assert!(e.starts_with("no/such/file.pt: cannot open"), "{e}");
}

/// A source that gives other bytes than its shape needs.
struct Liar(usize);

impl TensorSource for Liar {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &[2]
    }
    fn strides(&self) -> &[usize] {
        &[1]
    }
    fn le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        sink(&vec![0; self.0])
    }
}

/// A source whose strides leave holes.
struct Holes;

impl TensorSource for Holes {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &[2]
    }
    fn strides(&self) -> &[usize] {
        &[2]
    }
    fn le_bytes(&self, _: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        Ok(())
    }
}

/// Room for so many bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0 == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
        }
        let n = bytes.len().min(self.0);
        self.0 -= n;
        Ok(n)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn writers_refuse_what_they_cannot_write() {
    for wrong in [0, 7, 9] {
        let liar = Liar(wrong);
        assert!(pt::write_state_dict(Vec::new(), "x", &[("t", &liar)]).unwrap_err().to_string().contains("needs 8"));
        assert!(safetensors::write(Vec::new(), &[("t", &liar)], &[]).is_err());
        assert!(npy::write(Vec::new(), &liar).is_err());
    }
    assert!(pt::write_state_dict(Vec::new(), "x", &[("t", &Holes)]).unwrap_err().to_string().contains("densely"));
    assert!(safetensors::write(Vec::new(), &[("t", &Holes)], &[]).is_err());
    let t = patterned(Dtype::F32, &[3]);
    assert!(safetensors::write(Vec::new(), &[("t", &t), ("t", &t)], &[]).is_err());
    assert!(safetensors::write(Vec::new(), &[("__metadata__", &t)], &[]).is_err());
    let twice = [("a".to_string(), String::new()), ("a".to_string(), String::new())];
    assert!(safetensors::write(Vec::new(), &[("t", &t)], &twice).is_err());
    for folder in ["", "a/b", "..", "a\\b", "a\0"] {
        assert!(Writer::new(Vec::new(), folder).is_err(), "{folder:?}");
    }
    let mut deep = Save::None;
    for _ in 0..500 {
        deep = Save::List(vec![deep]);
    }
    assert!(Writer::new(Vec::new(), "x").unwrap().save(&deep).unwrap_err().to_string().contains("deeper"));
    let whole = save_state_dict("x", &[("t", t.clone())]).len();
    for room in 0..whole {
        assert!(pt::write_state_dict(Full(room), "x", &[("t", &t)]).is_err(), "room for {room}");
    }
    assert!(pt::write_state_dict(Full(whole), "x", &[("t", &t)]).is_ok());
}

/// A source of that many zeros.
struct Zeros([usize; 1]);

impl TensorSource for Zeros {
    fn dtype(&self) -> Dtype {
        Dtype::U8
    }
    fn shape(&self) -> &[usize] {
        &self.0
    }
    fn strides(&self) -> &[usize] {
        &[1]
    }
    fn le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let piece = vec![0; 1 << 20];
        (0..self.0[0]).step_by(piece.len()).try_for_each(|at| sink(&piece[..piece.len().min(self.0[0] - at)]))
    }
}

/// A file in memory whose long pieces of zeros take none.
#[derive(Default)]
struct Sparse {
    pieces: Vec<(u64, Vec<u8>)>,
    length: u64,
    at: u64,
}

impl std::io::Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Only `Zeros` gives long ones.
        if bytes.len() < 1 << 16 {
            self.pieces.push((self.length, bytes.to_vec()));
        }
        self.length += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::io::Read for Sparse {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let n = out.len().min((self.length - self.at.min(self.length)) as usize);
        out[..n].fill(0);
        let end = self.at + n as u64;
        for (start, bytes) in &self.pieces {
            let (from, to) = (self.at.max(*start), end.min(start + bytes.len() as u64));
            if from < to {
                let piece = &bytes[(from - start) as usize..(to - start) as usize];
                out[(from - self.at) as usize..(to - self.at) as usize].copy_from_slice(piece);
            }
        }
        self.at = end;
        Ok(n)
    }
}

impl std::io::Seek for Sparse {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        self.at = match to {
            std::io::SeekFrom::Start(at) => at,
            std::io::SeekFrom::Current(by) => self.at.checked_add_signed(by).unwrap(),
            std::io::SeekFrom::End(by) => self.length.checked_add_signed(by).unwrap(),
        };
        Ok(self.at)
    }
}

#[test]
fn a_file_beyond_4_gib_goes_round() {
    // A short record, a long one, then one that is empty and a short one, which lie beyond 4 GiB.
    let (long, small, none) =
        (Zeros([(1 << 32) + 12_345]), patterned(Dtype::F32, &[5, 7]), patterned(Dtype::F32, &[0]));
    let entries: [(&str, &dyn TensorSource); 4] =
        [("first", &small), ("long", &long), ("none", &none), ("last", &small)];
    let root = Save::Dict(entries.iter().map(|&(name, tensor)| (name.into(), Save::Tensor(tensor))).collect());
    let file = Writer::new(Sparse::default(), "big").unwrap().save(&root).unwrap();
    // What is left of the file that PyTorch 2.15 writes for the same dict, `torch.save(dict, "big.pt")`, without the zeros.
    let kept: Vec<u8> = file.pieces.iter().filter(|p| p.1.iter().any(|&b| b != 0)).flat_map(|p| p.1.clone()).collect();
    assert_eq!((file.length, kept.len(), crc32(&kept)), (4_294_982_273, 2632, 0x2e7a_5657));
    let mut file = PtFile::new(file).unwrap();
    let found: Vec<_> = file.tensors().iter().map(|t| (t.name.clone(), t.tensor.shape.clone())).collect();
    let expected = entries.map(|(name, tensor)| (name.to_owned(), tensor.shape().to_vec()));
    assert_eq!(found, expected);
    for name in ["first", "last"] {
        let tensor = file.find(&[name.into()]).unwrap();
        assert_eq!(file.read(&tensor).unwrap(), small);
    }
}

#[test]
fn long_dicts_and_lists_come_in_batches() {
    for n in [999, 1000, 1001, 2000, 2500] {
        let entries = (0..n).map(|i| (PathPart::Index(i), Save::List(vec![Save::Int(i); 2]))).collect();
        let list = Save::List((0..n).map(Save::Int).collect());
        let root = Save::Tuple(vec![Save::Dict(entries), list]);
        let file = PtFile::new(Cursor::new(Writer::new(Vec::new(), "x").unwrap().save(&root).unwrap())).unwrap();
        let items: Vec<_> = file.root().items().collect();
        assert_eq!((items[0].entries().count(), items[1].items().count()), (n as usize, n as usize));
        let last = items[1].items().last().unwrap();
        assert_eq!(last.as_i64(), Some(n - 1));
    }
}

#[test]
fn a_file_is_read_as_what_its_name_says() {
    let tensor = constant(Dtype::F32, 1.0, &[2]);
    let named = |ending: &str| std::env::temp_dir().join(format!("crosscoder-names-{}.{ending}", std::process::id()));
    let formats = [
        ("pt", save_state_dict("a", &[("t", tensor.clone())]), "not a .pt file"),
        ("safetensors", safetensors::write(Vec::new(), &[("t", &tensor)], &[]).unwrap(), "safetensors header of"),
        ("npy", npy::write(Vec::new(), &tensor).unwrap(), "not a .npy file"),
    ];
    for (ending, _, what) in &formats {
        for (format, bytes, _) in &formats {
            let path = named(ending);
            std::fs::write(&path, bytes).unwrap();
            match TensorFile::open(&path) {
                Ok(file) => assert_eq!((format!("{}", file.format()), ending), (ending.to_string(), format)),
                Err(e) => assert!(ending != format && e.to_string().contains(what), "{ending}, {format}: {e}"),
            }
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn what_could_not_be_read_back_is_not_written() {
    let deep = |n: usize| Tensor::new(vec![1; n], Values::F32(vec![1.0])).unwrap();
    let pt = |tensors: &[(&str, &dyn TensorSource)]| pt::write_state_dict(Vec::new(), "a", tensors);
    for (dimensions, taken) in [(64, true), (65, false)] {
        let tensor = deep(dimensions);
        assert_eq!(npy::write(Vec::new(), &tensor).is_ok(), taken);
        assert_eq!(pt(&[("a", &tensor)]).is_ok(), taken);
        assert_eq!(safetensors::write(Vec::new(), &[("a", &tensor)], &[]).is_ok(), taken);
    }
    let tensor = deep(1);
    let error = pt(&[("a", &tensor), ("a", &tensor)]).unwrap_err().to_string();
    assert!(error.contains("two tensors have the name \"a\""), "{error}");
}

fn npy_file(header: &str, data: &[u8]) -> Vec<u8> {
    [b"\x93NUMPY\x01\x00", &(header.len() as u16).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn npy_headers() {
    let read = |header: &str, data: &[u8]| NpyFile::new(Cursor::new(npy_file(header, data))).and_then(|mut f| f.read());
    let data: Vec<u8> = (0..24).collect();
    for header in [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
        "{\"shape\":(2,3),\"descr\":\"<f4\",\"fortran_order\":False}       \n",
        "{ 'fortran_order' : True , 'shape' : ( 2 , 3 , ) , 'descr' : '<f4' , }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|b1', 'fortran_order': False, 'shape': (24,)}",
        "{'descr': '<V2', 'fortran_order': False, 'shape': (1, 12)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (3, 1)}",
    ] {
        let tensor = read(header, &data).unwrap_or_else(|e| panic!("{header}: {e}"));
        assert_eq!(tensor.len() * tensor.dtype().size_bytes(), 24);
    }
    assert!(read("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", &data[..4]).unwrap().shape().is_empty());
    assert_eq!(read("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 7)}", b"").unwrap().shape(), [0, 7]);
    assert_eq!(read("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3)}", &data).unwrap().strides(), [1, 2]);
    for (header, word) in [
        ("", "'{'"),
        ("{}", "all needed"),
        ("{'descr': '<f4', 'fortran_order': False}", "all needed"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'x': 1}", "not \"x\""),
        ("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}", "twice"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)} x", "white space"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)", "'}'"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3),, }", "string"),
        ("{'descr': '<f4' 'fortran_order': False, 'shape': (2, 3)}", "'}'"),
        ("{'descr': '<f4', 'fortran_order': false, 'shape': (2, 3)}", "True or False"),
        ("{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}", "True or False"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (6)}", "no tuple"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': 6}", "'('"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': [2, 3]}", "'('"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (02, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (+2, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1_0, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0x2, 3)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616, 0)}", "size"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 4)}", "overflow"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807,)}", "more than"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", "needs 4000000000000"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}", "needs 16"),
        ("{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3)}", "big-endian"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", "object"),
        ("{'descr': '<c8', 'fortran_order': False, 'shape': (3,)}", "dtype"),
        ("{'descr': '|V2', 'fortran_order': False, 'shape': (12,)}", "dtype"),
        ("{'descr': '|S24', 'fortran_order': False, 'shape': (1,)}", "dtype"),
        ("{'descr': '<f4\\n', 'fortran_order': False, 'shape': (2, 3)}", "closing quote"),
        ("{'descr': u'<f4', 'fortran_order': False, 'shape': (2, 3)}", "string"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (6,)}", "structured"),
        ("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (3,)}", "structured"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\0", "white space"),
        ("dict(descr='<f4', fortran_order=False, shape=(2, 3))", "'{'"),
    ] {
        let e = read(header, &data).expect_err(header).to_string();
        assert!(e.contains(word), "{header}: {e:?} lacks {word:?}");
    }
    let good = npy_file("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", &data);
    for cut in 0..good.len() {
        assert!(NpyFile::new(Cursor::new(&good[..cut])).is_err(), "cut to {cut}");
    }
    assert!(NpyFile::new(Cursor::new([&good[..], b"x"].concat())).is_err());
    for (at, byte) in [(6, 4), (7, 1), (6, 0)] {
        let mut bad = good.clone();
        bad[at] = byte;
        assert!(NpyFile::new(Cursor::new(bad)).unwrap_err().to_string().contains("version"));
    }
    for at in 0..good.len() {
        for byte in 0..=255 {
            let mut bad = good.clone();
            bad[at] = byte;
            let _ = NpyFile::new(Cursor::new(bad)).and_then(|mut f| f.crc32());
        }
    }
}

/// `safetensors.torch.save` of safetensors 0.8 for the same tensors.
#[test]
fn tensors_of_all_types_lie_as_in_the_reference_library() {
    let header = r#"{"j":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"i":{"dtype":"F64","shape":[1],"data_offsets":[8,16]},"b":{"dtype":"F32","shape":[1],"data_offsets":[16,20]},"a":{"dtype":"I32","shape":[1],"data_offsets":[20,24]},"g":{"dtype":"BF16","shape":[1],"data_offsets":[24,26]},"f":{"dtype":"F16","shape":[1],"data_offsets":[26,28]},"h":{"dtype":"I16","shape":[1],"data_offsets":[28,30]},"e":{"dtype":"I8","shape":[1],"data_offsets":[30,31]},"c":{"dtype":"U8","shape":[1],"data_offsets":[31,32]},"d":{"dtype":"BOOL","shape":[1],"data_offsets":[32,33]}}    "#;
    use Dtype::*;
    let dtypes = [
        ("a", I32),
        ("b", F32),
        ("c", U8),
        ("d", Bool),
        ("e", I8),
        ("f", F16),
        ("g", BF16),
        ("h", I16),
        ("i", F64),
        ("j", I64),
    ];
    let list = dtypes.map(|(name, dtype)| (name, patterned(dtype, &[1])));
    let list: Vec<(&str, &dyn TensorSource)> = list.iter().map(|(name, tensor)| (*name, tensor as _)).collect();
    let saved = safetensors::write(Vec::new(), &list, &[]).unwrap();
    assert_eq!(String::from_utf8_lossy(&saved[8..saved.len() - 33]), header);
}

fn st_file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn safetensors_headers() {
    let a = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let b = r#""b":{"shape": [1, 2] , "data_offsets": [8, 12], "dtype": "F16"}"#;
    let read = |header: &str, bytes: usize| SafetensorsFile::new(Cursor::new(st_file(header, &vec![7; bytes])));
    for (header, bytes, count) in [
        ("{}".to_string(), 0, 0),
        ("{}    \n".to_string(), 0, 0),
        (r#"{"__metadata__":{}}"#.into(), 0, 0),
        (format!("{{{a}}}"), 8, 1),
        (format!("{{{a},{b}}}"), 12, 2),
        (format!("{{ {b} , {a} }}  "), 12, 2),
        (format!(r#"{{"__metadata__":{{"k":"v","l\n":"\u00e9\ud83e\udde0"}},{a}}}"#), 8, 1),
        (r#"{"x":{"dtype":"BOOL","shape":[0,9],"data_offsets":[0,0]},"y":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}"#.into(), 1, 2),
    ] {
        let file = read(&header, bytes).unwrap_or_else(|e| panic!("{header}: {e}"));
        assert_eq!(file.tensors().len(), count, "{header}");
    }
    let tensor = |inner: &str| format!(r#"{{"a":{{{inner}}}}}"#);
    let deep = |n: usize| tensor(&format!(r#""dtype":"U8","shape":{:?},"data_offsets":[0,1]"#, vec![1; n]));
    assert_eq!(read(&deep(64), 1).unwrap().tensors()[0].shape.len(), 64);
    let cases = [
        (deep(65), "65 dimensions; the limit is 64"),
        ("".to_string(), "'{'"),
        (" {}".into(), "first byte"),
        ("[]".into(), "'{'"),
        ("{".into(), "'\"'"),
        ("{}x".into(), "white space"),
        ("{}\0".into(), "white space"),
        (format!("{{{a},}}"), "'\"'"),
        (format!("{{{a} {a}}}"), "'}'"),
        (format!("{{{a},{a}}}"), "duplicate"),
        (format!(r#"{{{a},"\u0061":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#), "duplicate"),
        (r#"{"__metadata__":{"k":"v","k":"w"}}"#.into(), "duplicate"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), "duplicate"),
        (r#"{"__metadata__":{"k":1}}"#.into(), "'\"'"),
        (r#"{"__metadata__":null}"#.into(), "'{'"),
        (r#"{"__metadata__":{"k":null}}"#.into(), "'\"'"),
        (r#"{"__metadata__":{"k":{}}}"#.into(), "'\"'"),
        (r#"{"a":[]}"#.into(), "'{'"),
        (tensor(""), "all needed"),
        (tensor(r#""dtype":"F32","shape":[2]"#), "all needed"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1"#), "not \"x\""),
        (tensor(r#""dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]"#), "duplicate"),
        (tensor(r#""dtype":"F33","shape":[2],"data_offsets":[0,8]"#), "F33"),
        (tensor(r#""dtype":"f32","shape":[2],"data_offsets":[0,8]"#), "dtype"),
        (tensor(r#""dtype":"U16","shape":[4],"data_offsets":[0,8]"#), "dtype"),
        (tensor(r#""dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]"#), "dtype"),
        (tensor(r#""dtype":"F32","shape":[2.0],"data_offsets":[0,8]"#), "']'"),
        (tensor(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#), "integer"),
        (tensor(r#""dtype":"F32","shape":[02],"data_offsets":[0,8]"#), "integer"),
        (tensor(r#""dtype":"F32","shape":["2"],"data_offsets":[0,8]"#), "integer"),
        (tensor(r#""dtype":"F32","shape":[2,],"data_offsets":[0,8]"#), "integer"),
        (tensor(r#""dtype":"F32","shape":2,"data_offsets":[0,8]"#), "'['"),
        (tensor(r#""dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]"#), "integer"),
        (tensor(r#""dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,0]"#), "overflow"),
        (tensor(r#""dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]"#), "overflow"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0]"#), "two numbers"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,8,8]"#), "two numbers"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), "needs 8"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[0,7]"#), "needs 8"),
        (tensor(r#""dtype":"F32","shape":[2],"data_offsets":[1,9]"#), "ends at byte 9"),
        (tensor(r#""dtype":"F32","shape":[1],"data_offsets":[4,8]"#), "hole"),
        (tensor(r#""dtype":"F32","shape":[1],"data_offsets":[0,4]"#), "cover 4"),
        (format!(r#"{{{a},"b":{{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}}}"#), "overlap"),
        (format!(r#"{{{a},"b":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#), "overlap"),
        (format!(r#"{{{a},"e":{{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}}}"#), "overlap"),
        ("{\"a\n\":1}".into(), "closing quote"),
        (r#"{"a\x":1}"#.into(), "escapes"),
        (r#"{"\ud800":1}"#.into(), "escapes"),
        (r#"{"a"#.into(), "closing quote"),
        (r#"{"a\"#.into(), "closing quote"),
    ];
    for (header, word) in cases {
        let e = read(&header, 8).map(|_| ()).expect_err(&header).to_string();
        assert!(e.contains(word), "{header}: {e:?} lacks {word:?}");
    }
    let raw = |bytes: &[u8]| SafetensorsFile::new(Cursor::new(bytes.to_vec())).map(|_| ());
    assert!(raw(b"\x02\0\0\0\0\0\0\0{\xff").unwrap_err().to_string().contains("UTF-8"));
    assert!(raw(b"\x01\0\0\0").is_err());
    assert!(raw(&[255; 20]).is_err());
    let good = st_file(&format!("{{{a},{b}}}"), &[7; 12]);
    for cut in 0..good.len() {
        assert!(raw(&good[..cut]).is_err(), "cut to {cut}");
    }
    assert!(raw(&[&good[..], b"x"].concat()).is_err());
    for at in 0..good.len() {
        for byte in 0..=255 {
            let mut bad = good.clone();
            bad[at] = byte;
            let _ = SafetensorsFile::new(Cursor::new(bad)).and_then(|mut f| f.crc32(0));
        }
    }
}
