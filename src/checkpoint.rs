//! Checkpoints: `version_K/N.pt` with `N_cfg.json` beside it, or `cc_weights.pt` with `cfg.json`. They are read in any layout
//! that [`crate::layouts`] knows, and written in the original's.
//!
//! Original: `create_save_dir`, `save`, `load`. Both files of a checkpoint are written and synced beside their places first;
//! then the cfg is renamed, then the weights. A reader goes by the weights, so it finds a checkpoint whole or not at all.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use crate::atomic;
use crate::autodiff::{PARAMETER_NAMES, Parameters};
use crate::backend::{Backend, Cpu, Scalar, Shaped};
use crate::batch_topk::{ALPHA_KEYS, CODE_NORMALIZATION_KEY, NORM_SCALES_KEY, THRESHOLD_KEY};
use crate::config::Config;
use crate::crosscoder::{CrossCoder, checked_shape};
use crate::dtype::Dtype;
use crate::error::{Error, ErrorKind, Result};
use crate::files::{TensorFile, read_beside};
use crate::init::initial_weights;
use crate::layouts;
use crate::normalisation::{FACTOR_KEY, FOLDED_KEY};
use crate::pt::{self, TensorSource};
use crate::safetensors;
use crate::tensor::{Tensor, Values, row_major_strides};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Elements that are fetched from a backend at a time when a parameter is saved.
const SAVE_ELEMENTS: usize = 1 << 16;

/// A cfg longer than this is refused; the original's has 600 bytes.
const CFG_BYTES: u64 = 1 << 20;

/// The files of one checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The weights, `.pt` or `.safetensors`.
    pub weights: PathBuf,
    /// The cfg.
    pub cfg: PathBuf,
}

impl Files {
    /// The error in the file that it is about: the cfg for one of its keys, the weights for all else.
    pub fn blame(&self, error: Error) -> Error {
        let file = if error.kind() == ErrorKind::Config { &self.cfg } else { &self.weights };
        error.in_file(file)
    }
}

/// The names of a checkpoint that has a folder of its own, weights and cfg: the original's on the hub, the same as
/// `.safetensors`, and what the `dictionary_learning` fork publishes and trains.
pub const FOLDER_NAMES: [[&str; 2]; 6] = [
    ["cc_weights.pt", "cfg.json"],
    ["cc_weights.safetensors", "cfg.json"],
    ["model.safetensors", "config.json"],
    ["model_final.pt", "config.json"],
    ["ae.pt", "config.json"],
    ["model.pt", "config.json"],
];

/// The names that the cfg beside a weights file may have, the first that is there first: `NAME_cfg.json`, `cfg.json`,
/// `config.json`, the latter two the other way round where [`FOLDER_NAMES`] says so.
pub fn cfg_names(weights: &Path) -> [OsString; 3] {
    let mut own = weights.file_stem().unwrap_or_default().to_owned();
    own.push("_cfg.json");
    let others = match cfg_of_folder(weights) {
        Some("config.json") => ["config.json", "cfg.json"],
        _ => ["cfg.json", "config.json"],
    };
    let [first, second] = others.map(OsString::from);
    [own, first, second]
}

/// What the cfg is called in a folder whose weights have this name, one of [`FOLDER_NAMES`].
fn cfg_of_folder(weights: &Path) -> Option<&'static str> {
    FOLDER_NAMES.iter().find(|[name, _]| weights.file_name().is_some_and(|n| n == *name)).map(|&[_, cfg]| cfg)
}

/// The cfg beside a weights file, `there` telling which files are there.
fn cfg_beside(weights: &Path, there: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    cfg_names(weights).iter().map(|name| weights.with_file_name(name)).find(|cfg| there(cfg))
}

/// Whether anything is there, a link that leads nowhere too.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Where the cfg of weights that are to be written goes: where the one is that they have if they are there, be it in a folder
/// under one of [`FOLDER_NAMES`] or because they are those of the checkpoint `from`; else beside them as `NAME_cfg.json`.
pub fn files_for(weights: &Path, from: &Files) -> Files {
    let [own, ..] = cfg_names(weights).map(|name| weights.with_file_name(name));
    let paired = cfg_of_folder(weights).is_some_and(|cfg| is_there(&weights.with_file_name(cfg)));
    let has_another = is_there(weights) && (paired || same(weights, &from.weights));
    let cfg = cfg_beside(weights, is_there).filter(|_| has_another).unwrap_or(own);
    Files { weights: weights.to_owned(), cfg }
}

/// Whether both are there and one file.
fn same(a: &Path, b: &Path) -> bool {
    a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// The keys of a cfg by which weights are read otherwise.
const READ_BY: [&str; 8] = [
    "enc_dtype",
    FACTOR_KEY,
    FOLDED_KEY,
    THRESHOLD_KEY,
    CODE_NORMALIZATION_KEY,
    ALPHA_KEYS[0],
    ALPHA_KEYS[1],
    NORM_SCALES_KEY,
];

/// The keys of sizes, of which a cfg may lack some.
const SIZES: [&str; 3] = ["d_in", "dict_size", "n_models"];

/// Whether weights are read alike with both.
fn reads_alike(a: &Config, b: &Config) -> bool {
    READ_BY.iter().all(|key| a.get(key) == b.get(key))
        && SIZES.iter().filter_map(|key| a.get(key).zip(b.get(key))).all(|(a, b)| a == b)
}

/// That writing `out` with this cfg leaves each other checkpoint in its folder the cfg that fits it: weights that stay the one that
/// they have, links to the weights the new one.
///
/// # Errors
/// One that would have another.
pub fn keeps_others(out: &Files, cfg: &Config) -> Result<()> {
    // A folder that can be written may not be listed.
    for entry in std::fs::read_dir(atomic::folder_of(&out.weights)).into_iter().flatten().flatten() {
        let weights = out.weights.with_file_name(entry.file_name());
        if weights.file_name() == out.weights.file_name() || !weights.is_file() {
            continue;
        }
        let is_out = |cfg: &Path| cfg.file_name() == out.cfg.file_name() || same(cfg, &out.cfg);
        let gets_it = cfg_beside(&weights, |cfg| is_there(cfg) || is_out(cfg)).is_some_and(|cfg| is_out(&cfg));
        if gets_it == same(&weights, &out.weights) {
            continue;
        }
        let fits = match cfg_beside(&weights, is_there) {
            Some(now) => read_cfg(&now).map_or(true, |now| reads_alike(&now, cfg)),
            None => !gets_it,
        };
        let is_checkpoint =
            || TensorFile::open(&weights).is_ok_and(|f| layouts::recognise(f.tensors()).is_ok_and(|l| l.is_some()));
        if !fits && is_checkpoint() {
            let what =
                format!("{} would no longer fit its cfg; give OUT another name, or remove that", weights.display());
            return Err(Error::usage(what).in_file(&out.cfg));
        }
    }
    Ok(())
}

/// That weights without a cfg do not get one that is not theirs, where they are written.
///
/// # Errors
/// If one is there.
pub fn has_no_cfg(weights: &Path) -> Result<()> {
    match cfg_beside(weights, is_there) {
        Some(cfg) => {
            let what = format!("would be read with {}, and IN has no cfg; give OUT another name", cfg.display());
            Err(Error::usage(what).in_file(weights))
        }
        None => Ok(()),
    }
}

/// The checkpoint `N` in a version directory: `N.pt` and `N_cfg.json`.
pub fn numbered(dir: &Path, n: usize) -> Files {
    Files { weights: dir.join(format!("{n}.pt")), cfg: dir.join(format!("{n}_cfg.json")) }
}

/// The numbers of the checkpoints in a version directory, ascending: there is a weights file for each.
///
/// # Errors
/// If the directory cannot be listed.
pub fn numbers(dir: &Path) -> Result<Vec<usize>> {
    list(dir, |name| name.strip_suffix(".pt"))
}

/// The numbers of the version directories in `base`, ascending.
///
/// # Errors
/// If the directory cannot be listed.
pub fn versions(base: &Path) -> Result<Vec<usize>> {
    list(base, |name| name.strip_prefix("version_"))
}

/// `version_K` for a number K.
pub fn version_dir(base: &Path, version: usize) -> PathBuf {
    base.join(format!("version_{version}"))
}

/// Makes the next version directory, `version_0` or one more than the largest there is. Original: `create_save_dir`.
///
/// # Errors
/// If it cannot be made.
pub fn create_save_dir(base: &Path) -> Result<PathBuf> {
    atomic::create_folders(base)?;
    let mut next = versions(base)?.last().map_or(Some(0), |last| last.checked_add(1));
    loop {
        let Some(version) = next else {
            return Err(Error::usage(format!("no version above version_{} can be made", usize::MAX)).in_file(base));
        };
        let dir = version_dir(base, version);
        match std::fs::create_dir(&dir) {
            Ok(()) => return atomic::sync_folder(&dir).map(|()| dir),
            // Another process was faster.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => next = version.checked_add(1),
            Err(e) => return Err(Error::io("cannot make the folder", e).in_file(&dir)),
        }
    }
}

fn list(dir: &Path, number: impl Fn(&str) -> Option<&str>) -> Result<Vec<usize>> {
    let cannot = |e| Error::io("cannot list the folder", e).in_file(dir);
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(cannot)? {
        let name = entry.map_err(cannot)?.file_name();
        // `007` would be another file than `7`: only the spelling that we write counts.
        let n = name
            .to_str()
            .and_then(&number)
            .and_then(|text| text.parse::<usize>().ok().filter(|n| n.to_string() == text));
        numbers.extend(n);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The files of the checkpoint at `path`: a weights file with its cfg beside it, a version directory, whose newest checkpoint
/// it is, or a directory with the two files of [`FOLDER_NAMES`], the cfg also as [`cfg_names`] says.
///
/// # Errors
/// If there is no checkpoint; the message names what was looked for.
pub fn find(path: &Path) -> Result<Files> {
    if path.is_dir() {
        if let Some(&newest) = numbers(path)?.last() {
            return Ok(numbered(path, newest));
        }
        let there = |[weights, _]: &&[&str; 2]| path.join(weights).is_file();
        if let Some([weights, _]) = FOLDER_NAMES.iter().find(there) {
            return find(&path.join(weights));
        }
        let runs = versions(path)?.into_iter().rev().map(|run| version_dir(path, run));
        if let Some(run) = runs.into_iter().find(|run| run.is_dir()) {
            return Err(
                Error::usage(format!("holds runs, not a checkpoint; the newest is {}", run.display())).in_file(path)
            );
        }
        let names: Vec<String> = FOLDER_NAMES.iter().map(|[weights, cfg]| format!("{weights} with {cfg}")).collect();
        let what = format!("no checkpoint here: looked for N.pt with N_cfg.json, {}", names.join(", "));
        return Err(Error::usage(what).in_file(path));
    }
    if let Err(e) = path.metadata() {
        let absent = e.kind() == std::io::ErrorKind::NotFound;
        return Err(Error::io(if absent { "no such checkpoint" } else { "cannot look at it" }, e).in_file(path));
    }
    match cfg_beside(path, is_there) {
        Some(cfg) => Ok(Files { weights: path.to_owned(), cfg }),
        None => {
            let names = cfg_names(path);
            let names = names.each_ref().map(|name| name.to_string_lossy());
            let what = format!("its cfg is missing: none of {} is beside it", names.join(", "));
            Err(Error::usage(what).in_file(path))
        }
    }
}

/// Reads a cfg.
///
/// # Errors
/// A file that cannot be read, is not regular, has more than 1 MiB, or is no JSON object.
pub fn read_cfg(path: &Path) -> Result<Config> {
    Config::from_json(&read_beside(path, CFG_BYTES)?).map_err(|e| e.in_file(path))
}

/// Reads a checkpoint's cfg and its four parameters, on the host: in whatever layout, the original's comes out.
///
/// # Errors
/// Files that cannot be read; weights of no layout that is known, or of one that is not supported; weights that contradict each
/// other or the cfg.
pub fn read(files: &Files) -> Result<(Config, Parameters<Tensor>)> {
    let (cfg, weights) = layouts::read(&mut TensorFile::open(&files.weights)?, read_cfg(&files.cfg)?, &files.cfg)?;
    checked_shape(&cfg, &weights).map_err(|e| files.blame(e))?;
    Ok((cfg, weights))
}

impl CrossCoder {
    /// A crosscoder with the initial weights that the cfg's `seed`, `enc_dtype`, `d_in`, `dict_size` and `dec_init_norm` say, bit
    /// for bit those of the original; for two models, as there, or as many as the key `n_models` says. Original:
    /// `CrossCoder(cfg)`.
    ///
    /// # Errors
    /// A key that is missing or ill-typed.
    pub fn new(cfg: Config) -> Result<Self> {
        Self::new_on(Cpu::new(cfg.enc_dtype()?), cfg)
    }

    /// Loads the checkpoint at `path`, see [`find`] for what that may be. Original: `load`.
    ///
    /// ```no_run
    /// let crosscoder = crosscoder::CrossCoder::load("checkpoints/version_0")?;
    /// # Ok::<(), crosscoder::Error>(())
    /// ```
    ///
    /// # Errors
    /// Files that are missing, damaged or contradict each other; the message names file, entry, what was needed and found.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(&find(path.as_ref())?, Cpu::new)
    }
}

impl<B: Backend> CrossCoder<B> {
    /// [`CrossCoder::new`] on any backend, in whose dtype the weights are drawn.
    ///
    /// # Errors
    /// As there.
    pub fn new_on(backend: B, cfg: Config) -> Result<Self> {
        let (seed, norm, shape) =
            (cfg.seed()?, cfg.number("dec_init_norm")?, [cfg.dict_size()?, cfg.n_models()?, cfg.d_in()?]);
        let weights = initial_weights(seed, shape[0], shape[1], shape[2], backend.dtype(), norm)?;
        Self::from_tensors(backend, cfg, weights)
    }

    /// [`CrossCoder::load`] on any backend, in whose dtype the weights are held.
    ///
    /// # Errors
    /// As there.
    pub fn load_on(backend: B, path: impl AsRef<Path>) -> Result<Self> {
        Self::load_files(backend, &find(path.as_ref())?)
    }

    /// Loads the checkpoint that these files are.
    ///
    /// # Errors
    /// As [`CrossCoder::load`].
    pub fn load_files(backend: B, files: &Files) -> Result<Self> {
        let (cfg, weights) = read(files)?;
        Self::from_tensors(backend, cfg, weights).map_err(|e| files.blame(e))
    }

    /// Loads the checkpoint that these files are on the backend that `backend` makes for its dtype.
    ///
    /// # Errors
    /// As [`CrossCoder::load`].
    pub fn load_with(files: &Files, backend: impl FnOnce(Dtype) -> B) -> Result<Self> {
        let (cfg, weights) = read(files)?;
        let dtype = cfg.enc_dtype().map_err(|e| e.in_file(&files.cfg))?;
        Self::from_tensors(backend(dtype), cfg, weights).map_err(|e| files.blame(e))
    }

    /// Saves the checkpoint whole or not at all: the weights as `torch.save(self.state_dict(), …)` writes them, byte for byte,
    /// or as `.safetensors` where the file is named so, and the cfg. Original: `save`.
    ///
    /// Memory beyond the weights is a small buffer; for `.safetensors`, which holds `W_enc` in row-major order, a copy of it.
    ///
    /// # Errors
    /// A folder that cannot be written to, a full disk; what was there before is untouched then.
    pub fn save(&self, files: &Files) -> Result<()> {
        let sources = self.sources_of(&self.params);
        write(files, &self.cfg, sources.each_ref().map(|source| source as &dyn TensorSource))
    }

    /// The parameters, or what has their shapes, as the original's `state_dict()` has them: order, shapes and strides;
    /// elements are fetched in pieces.
    pub(crate) fn sources_of<'a>(&'a self, p: &'a Parameters<B::Matrix>) -> [Source<'a, B>; 4] {
        let (h, m, d) = (self.d_hidden(), self.n_models(), self.d_in());
        // A matrix has rows of this length in memory.
        let row = m.saturating_mul(d);
        let source = |matrix, shape: &[usize], strides: &[usize]| Source {
            backend: &self.backend,
            matrix,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
        };
        [
            source(&p.w_enc, &[m, d, h], &[d, 1, row]),
            source(&p.w_dec, &[h, m, d], &[row, d, 1]),
            source(&p.b_enc, &[h], &[1]),
            source(&p.b_dec, &[m, d], &[d, 1]),
        ]
    }
}

/// Writes a checkpoint, whole or not at all; the parameters in the order of [`PARAMETER_NAMES`], in the original's shapes.
///
/// # Errors
/// As [`CrossCoder::save`].
pub fn write(files: &Files, cfg: &Config, parameters: [&dyn TensorSource; 4]) -> Result<()> {
    if files.weights == files.cfg {
        return Err(Error::usage("is to be both weights and cfg").in_file(&files.cfg));
    }
    let weights = atomic::stage(&files.weights, |out| {
        let named: Vec<(&str, &dyn TensorSource)> = PARAMETER_NAMES.into_iter().zip(parameters).collect();
        if is_safetensors(&files.weights) {
            return safetensors::write(out, &named, &[]).map(drop);
        }
        pt::write_state_dict(out, &pt::Writer::<Vec<u8>>::folder_for(&files.weights), &named).map(drop)
    })?;
    let cfg = atomic::stage(&files.cfg, |out| {
        out.write_all(cfg.to_json().as_bytes()).map_err(|e| Error::io("cannot write", e))
    })?;
    atomic::place_both(cfg, weights)
}

/// The four parameters in `dtype`, rounded to nearest even, and lying as the original lays them out: `W_enc` as
/// [d_hidden, n_models, d_in]. What lies and is so already is not copied.
///
/// # Errors
/// Integers, which are no weights.
pub fn cast(weights: Parameters<Tensor>, dtype: Dtype) -> Result<Parameters<Tensor>> {
    let Parameters { w_enc, w_dec, b_enc, b_dec } = weights;
    let w_enc = match w_enc.shape().len() {
        3 => w_enc.permuted(&[2, 0, 1]).into_row_major().permuted(&[1, 2, 0]),
        _ => w_enc,
    };
    Ok(Parameters {
        w_enc: w_enc.cast(dtype)?,
        w_dec: w_dec.into_row_major().cast(dtype)?,
        b_enc: b_enc.cast(dtype)?,
        b_dec: b_dec.into_row_major().cast(dtype)?,
    })
}

/// Whether a file's name asks for the format of safetensors.
pub fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors"))
}

/// A parameter on a backend, in the order it lies there, as something to be saved.
pub(crate) struct Source<'a, B: Backend> {
    backend: &'a B,
    matrix: &'a B::Matrix,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<B: Backend> TensorSource for Source<'_, B> {
    fn dtype(&self) -> Dtype {
        self.backend.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn strides(&self) -> &[usize] {
        &self.strides
    }

    fn le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (rows, cols) = self.matrix.shape();
        let (mut at, total) = (0usize, rows.saturating_mul(cols));
        while at < total {
            let mut piece = vec![B::Scalar::default(); SAVE_ELEMENTS.min(total.saturating_sub(at))];
            self.backend.download(self.matrix, at, &mut piece)?;
            at = at.saturating_add(piece.len());
            let values = B::Scalar::wrap(piece).cast(self.backend.dtype())?;
            values.each_le_bytes(&mut *sink)?;
        }
        Ok(())
    }

    fn row_major_le_bytes(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        if self.strides == row_major_strides(&self.shape) {
            return self.le_bytes(sink);
        }
        let mut values = Values::with_capacity(self.dtype(), self.shape.iter().product());
        self.le_bytes(&mut |bytes| {
            values.push_le_bytes(bytes);
            Ok(())
        })?;
        Tensor::with_strides(self.shape.clone(), self.strides.clone(), values)?.row_major_le_bytes(sink)
    }
}
