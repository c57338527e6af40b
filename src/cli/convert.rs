//! `crosscoder convert`: between formats and dtypes.

use super::args;
use crosscoder::atomic;
use crosscoder::autodiff::PARAMETER_NAMES;
use crosscoder::checkpoint::{self, Files, is_safetensors};
use crosscoder::dtype::Dtype;
use crosscoder::error::{Error, Result, printable};
use crosscoder::files::{TensorFile, TensorInfo};
use crosscoder::layouts::recognise;
use crosscoder::normalisation;
use crosscoder::pt::{self, Save, TensorSource};
use crosscoder::safetensors;
use crosscoder::tensor::{Tensor, Values};
use std::collections::HashSet;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const HELP: &str = "\
crosscoder convert IN OUT [--dtype fp32|fp16|bf16] [--fold] [--force]

Converts between .pt and .safetensors, by the name of OUT. IN is a checkpoint (a version directory, a weights file with its
cfg beside it, a folder with both, hf://OWNER/REPO[@REVISION][/PATH]) or any .pt, .safetensors or .npy file of tensors.

A checkpoint becomes one of the original's layout: W_enc with the original's strides in a .pt, the cfg beside OUT as
NAME_cfg.json (in that of OUT, where OUT is there and has another), its enc_dtype that of the weights. Layouts that are
read: the original's; the dictionary_learning fork's (CrossCoder, BatchTopKCrossCoder), its activation normalisation folded
into the weights; Neel Nanda's; one tensor for each model (W_enc_A, W_enc_B, …). A threshold of BatchTopK goes into the cfg,
which the Python original ignores. Of other files the tensors are kept by their names, and the metadata of a .safetensors in
another. Whatever else a file holds beside tensors (plain values in a .pt, metadata) is left out, and named on stderr.

  --dtype D  casts float tensors, rounding to nearest even [of a checkpoint: the cfg's enc_dtype]. Values too large for D become
             infinite, which is told on stderr
  --fold     folds the factors that activations were multiplied with in training (cfg key normalisation_factor) into the
             weights, which then take activations as they are
  --force    replaces OUT and its cfg if they are there, but no link and no cfg that other weights there need as it is
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut paths, mut dtype, mut fold, mut force) = (Vec::<PathBuf>::new(), None, false, false);
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("dtype") => {
                let name = args::text(parser)?;
                dtype = Some(
                    Dtype::from_enc_name(&name)
                        .map_err(|_| Error::usage(format!("--dtype needs fp32, fp16 or bf16, found '{name}'")))?,
                );
            }
            Long("fold") => fold = true,
            Long("force") => force = true,
            Long("help") | Short('h') => return args::help(HELP),
            Value(path) => paths.push(path.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let [from, to] = &paths[..] else { return Err(Error::usage("convert needs IN and OUT")) };
    args::named_for_tensors("OUT", to)?;
    let is_checkpoint = |files: &Files| match TensorFile::open(&files.weights).and_then(|f| recognise(f.tensors())) {
        Ok(layout) => layout.is_some(),
        Err(_) => true,
    };
    match args::checkpoint(from) {
        Ok(files) if !from.is_file() || is_checkpoint(&files) => convert_checkpoint(&files, to, dtype, fold, force)?,
        Err(error) if !from.is_file() => return Err(error),
        _ if fold => return Err(Error::usage("--fold needs a checkpoint: weights with their cfg").in_file(from)),
        _ => convert_tensors(from, to, dtype, force)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn convert_checkpoint(files: &Files, to: &Path, dtype: Option<Dtype>, fold: bool, force: bool) -> Result<()> {
    let out = checkpoint::files_for(to, files);
    for path in [&out.weights, &out.cfg] {
        args::may_write(path, force)?;
        if path.is_symlink() {
            // The other file of what it leads to would no longer fit.
            return Err(Error::usage("is a link; give the name of the file that it leads to").in_file(path));
        }
    }
    let (mut cfg, mut weights) = checkpoint::read(files)?;
    let file = TensorFile::open(&files.weights)?;
    let dtype = match dtype {
        Some(dtype) => dtype,
        None => {
            let dtype = cfg.enc_dtype().map_err(|e| e.in_file(&files.cfg))?;
            if let Some(other) = file.tensors().iter().find(|t| t.shape.len() > 1 && t.dtype != dtype) {
                let (from, name) = (other.dtype, printable(&other.name));
                tell(format_args!(
                    "{name} is {from}, written as {dtype}: the cfg's enc_dtype; --dtype asks for another"
                ));
            }
            dtype
        }
    };
    cfg.set("enc_dtype", dtype.enc_name().unwrap_or_default());
    let before = weights.each().map(infinite);
    if fold {
        weights = normalisation::fold_as(&mut cfg, weights, dtype).map_err(|e| e.in_file(&files.cfg))?;
    }
    checkpoint::keeps_others(&out, &cfg)?;
    let tensors = checkpoint::cast(weights, dtype)?;
    for ((name, tensor), before) in PARAMETER_NAMES.iter().zip(tensors.each()).zip(before) {
        tell_infinite(name, before, tensor);
    }
    tell_left_out(&file, false)?;
    checkpoint::write(&out, &cfg, tensors.each().map(|tensor| tensor as &dyn TensorSource))
}

fn convert_tensors(from: &Path, to: &Path, dtype: Option<Dtype>, force: bool) -> Result<()> {
    args::may_write(to, force)?;
    let mut file = TensorFile::open(from)?;
    if recognise(file.tensors()).is_ok_and(|layout| layout.is_some()) {
        checkpoint::has_no_cfg(to)?;
    }
    tell_left_out(&file, is_safetensors(to))?;
    let metadata = file.metadata().to_vec();
    fn name(entry: &TensorInfo) -> &str {
        if entry.name.is_empty() { "tensor" } else { &entry.name }
    }
    let mut names = HashSet::new();
    if let Some(again) = file.tensors().iter().map(name).find(|name| !names.insert(*name)) {
        return Err(Error::unsupported(format!("two tensors have the name {again:?}")).in_file(from));
    }
    let mut tensors = Vec::<(String, Tensor)>::new();
    for index in 0..file.tensors().len() {
        let name = name(&file.tensors()[index]).to_owned();
        let tensor = file.read_of_all(index)?;
        let is_float = matches!(tensor.dtype(), Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let tensor = match dtype {
            Some(dtype) if is_float => {
                let before = infinite(&tensor);
                let tensor = tensor.cast(dtype)?;
                tell_infinite(&name, before, &tensor);
                tensor
            }
            _ => tensor,
        };
        tensors.push((name, tensor));
    }
    atomic::write(to, |out| {
        if is_safetensors(to) {
            let named: Vec<(&str, &dyn TensorSource)> =
                tensors.iter().map(|(name, tensor)| (name.as_str(), tensor as &dyn TensorSource)).collect();
            return safetensors::write(out, &named, &metadata).map(drop);
        }
        let entries = tensors.iter().map(|(name, tensor)| (name.as_str().into(), Save::Tensor(tensor))).collect();
        let folder = pt::Writer::<Vec<u8>>::folder_for(to);
        pt::Writer::new(out, &folder)?.save(&Save::Dict(entries)).map(drop)
    })
}

fn tell(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// How many values are infinite.
fn infinite(tensor: &Tensor) -> usize {
    match tensor.values() {
        Values::F64(v) => v.iter().filter(|v| v.is_infinite()).count(),
        Values::F32(v) => v.iter().filter(|v| v.is_infinite()).count(),
        Values::F16(v) => v.iter().filter(|v| v.is_infinite()).count(),
        Values::BF16(v) => v.iter().filter(|v| v.is_infinite()).count(),
        _ => 0,
    }
}

/// Tells how many values a cast made infinite; `before` were so.
fn tell_infinite(name: &str, before: usize, tensor: &Tensor) {
    let more = infinite(tensor).saturating_sub(before);
    if more > 0 {
        tell(format_args!("{}: {more} values too large for {} are infinite", printable(name), tensor.dtype()));
    }
}

/// Names on stderr what a file holds beside tensors and the file to be written does not: plain values, sets, and what is empty.
fn tell_left_out(file: &TensorFile, keeps_metadata: bool) -> Result<()> {
    let mut out = BufWriter::new(std::io::stderr().lock());
    let (mut before, mut end) = ("plain values left out: ", "");
    if let Some(pt) = file.as_pt() {
        pt.plain_values(|path, _| {
            let name = if path.is_empty() { "(the root)".into() } else { printable(&pt::dotted(path)) };
            let _ = write!(out, "{before}{name}");
            (before, end) = (", ", "\n");
            Ok(())
        })?;
    }
    if let (false, [(first, _), more @ ..]) = (keeps_metadata, file.metadata()) {
        let _ = write!(out, "metadata left out: {}", printable(first));
        more.iter().for_each(|(key, _)| drop(write!(out, ", {}", printable(key))));
        end = "\n";
    }
    let _ = out.write_all(end.as_bytes());
    Ok(())
}
