//! `crosscoder encode`: the latents of activations, sparse.

use super::args;
use super::device::{self, with_backend};
use super::eval::factors;
use crosscoder::activations::Activations;
use crosscoder::atomic;
use crosscoder::backend::Backend;
use crosscoder::checkpoint::{Files, is_safetensors};
use crosscoder::error::{Error, ErrorKind, Result};
use crosscoder::evaluation::Batches;
use crosscoder::pt::{self, Save, TensorSource};
use crosscoder::{CrossCoder, Tensor, Values, safetensors};
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
crosscoder encode CHECKPOINT ACTS… --out F [--batch-size N] [--device D] [--raw]

Writes the latents of activations, those that are not zero, as a sparse matrix [rows, dict_size] in rows (CSR):

  crow_indices  int64 [rows + 1]: row i has the entries crow_indices[i] .. crow_indices[i + 1]
  col_indices   int64 [entries]: the latent of each entry, ascending in a row
  values        float32 [entries]
  size          int64 [2]: rows, dict_size

In PyTorch: t = torch.load(F); torch.sparse_csr_tensor(t['crow_indices'], t['col_indices'], t['values'], tuple(t['size'])).
CHECKPOINT, ACTS, --device and --raw as for `crosscoder eval`.

  --out F         .pt or .safetensors; what is there is not replaced
  --batch-size N  rows at a time [1024]; results do not depend on it
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short, Value};
    let (mut paths, mut out, mut batch_size, mut raw) = (Vec::<PathBuf>::new(), None::<PathBuf>, 1024usize, false);
    let mut device = device::DEFAULT.to_owned();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("out") => out = Some(parser.value().map_err(args::usage)?.into()),
            Long("batch-size") => batch_size = args::positive(parser, "batch-size")?,
            Long("device") => device = args::text(parser)?,
            Long("raw") => raw = true,
            Long("help") | Short('h') => return args::help(HELP),
            Value(path) => paths.push(path.into()),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    let (checkpoint, acts) = args::checkpoint_and_acts("encode", &paths)?;
    let out = out.ok_or_else(|| Error::usage("encode needs --out F"))?;
    args::named_for_tensors("--out", &out)?;
    if out.symlink_metadata().is_ok() {
        return Err(Error::usage("is there already").in_file(&out));
    }
    args::may_write(&out, false)?;
    let files = args::checkpoint(checkpoint)?;
    let (checkpoint, picked) = device::Checkpoint::read(&files, &device)?;
    let acts = Activations::open(acts)?;
    let tensors = with_backend!(picked, |backend| latents(&checkpoint.on(backend)?, &files, &acts, batch_size, raw))?;
    atomic::write(&out, |file| {
        if is_safetensors(&out) {
            let named: Vec<(&str, &dyn TensorSource)> =
                tensors.iter().map(|(name, tensor)| (*name, tensor as &dyn TensorSource)).collect();
            return safetensors::write(file, &named, &[]).map(drop);
        }
        let entries = tensors.iter().map(|(name, tensor)| ((*name).into(), Save::Tensor(tensor))).collect();
        pt::Writer::new(file, &pt::Writer::<Vec<u8>>::folder_for(&out))?.save(&Save::Dict(entries)).map(drop)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The tensors of the file, by name.
fn latents<B: Backend<Scalar = f32>>(
    crosscoder: &CrossCoder<B>,
    files: &Files,
    acts: &Activations,
    batch_size: usize,
    raw: bool,
) -> Result<[(&'static str, Tensor); 4]> {
    if (acts.n_models(), acts.d_in()) != (crosscoder.n_models(), crosscoder.d_in()) {
        let (found, needed) = ((acts.n_models(), acts.d_in()), (crosscoder.n_models(), crosscoder.d_in()));
        return Err(Error::shape(format!("rows of shape {found:?}; the crosscoder needs {needed:?}")).at(acts.place(0)));
    }
    let factors = factors(crosscoder, files, raw)?;
    let d_hidden = crosscoder.d_hidden();
    let (mut starts, mut columns, mut values) = (vec![0i64], Vec::<i64>::new(), Vec::<f32>::new());
    Batches::new(acts, 0..acts.rows(), batch_size, &factors).for_each::<f32>(|x| {
        let mut dense = vec![0f32; x.len() / acts.width() * d_hidden];
        crosscoder.encode_into(x, true, &mut dense)?;
        for row in dense.chunks_exact(d_hidden) {
            for (h, &v) in row.iter().enumerate().filter(|&(_, &v)| v != 0.0) {
                if !v.is_finite() {
                    let what = format!("latent {h} is {v}, computed in {}", crosscoder.dtype());
                    return Err(Error::new(ErrorKind::NonFinite, what).at(acts.place(starts.len() - 1)));
                }
                columns.push(h as i64);
                values.push(v);
            }
            starts.push(columns.len() as i64);
        }
        Ok(())
    })?;
    let vector = |values: Values| Tensor::new(vec![values.len()], values);
    Ok([
        ("crow_indices", vector(Values::I64(starts))?),
        ("col_indices", vector(Values::I64(columns))?),
        ("values", vector(Values::F32(values))?),
        ("size", vector(Values::I64(vec![acts.rows() as i64, d_hidden as i64]))?),
    ])
}
