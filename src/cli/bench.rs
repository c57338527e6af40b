//! `crosscoder bench`: measured speeds as CSV, each result checked.

use super::args;
use super::device::{self, with_backend};
use crosscoder::backend::Picked;
use crosscoder::bench::{self, CASES, CSV_HEADER, Case, OPS, QUICK};
use crosscoder::dtype::Dtype;
use crosscoder::error::{Error, Result};
use crosscoder::sparse::Path;
use std::process::ExitCode;

const HELP: &str = "\
crosscoder bench [--quick] [--case D_IN,DICT_SIZE,BATCH,L0]… [--dtype fp32|bf16|fp16]… [--op OP]
                 [--device D] [--path auto|dense|sparse]

Times the operations init, encode (batch 1 and BATCH), decode, get_losses, save, load, step, and prints CSV: machine, backend,
dtype, shape, L0, operation, the shortest of several times, bytes and floating-point operations per second (of the dense
formulas), a number of the result. Each result is checked before its time is printed; exit status 1 if one is wrong.

  --quick      small shapes, seconds
  --case CASE  this shape, with L0 latents on in a row on average [the shapes of the README, 2.5 GB of memory]
  --dtype T    [all three]
  --op OP      this operation only
  --device D   cpu, cuda or cuda:N: the GPU, if there is one [cpu]
  --path PATH  how latents are held: by the faster way [auto], always dense, always sparse
";

pub(crate) fn run(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    use lexopt::Arg::{Long, Short};
    let (mut cases, mut dtypes, mut op, mut path) = (Vec::new(), Vec::new(), None, Path::Auto);
    let mut device = device::DEFAULT.to_owned();
    while let Some(arg) = parser.next().map_err(args::usage)? {
        match arg {
            Long("quick") => cases.extend(QUICK),
            Long("case") => cases.push(case(&args::text(parser)?)?),
            Long("dtype") => dtypes.push(Dtype::from_enc_name(&args::text(parser)?)?),
            Long("op") => op = Some(args::text(parser)?),
            Long("device") => device = args::text(parser)?,
            Long("path") => path = args::path(parser)?,
            Long("help") | Short('h') => return args::help(HELP),
            other => return Err(args::usage(other.unexpected())),
        }
    }
    if let Some(op) = op.as_deref().filter(|op| !OPS.contains(op)) {
        return Err(Error::usage(format!("--op needs one of {}, found '{op}'", OPS.join(", "))));
    }
    let cases = if cases.is_empty() { CASES.to_vec() } else { cases };
    let dtypes = if dtypes.is_empty() { vec![Dtype::F32, Dtype::BF16, Dtype::F16] } else { dtypes };
    let machine = bench::machine();
    args::print(&format!("{CSV_HEADER}\n"))?;
    for case in cases {
        for &dtype in &dtypes {
            let mut print = |row: bench::Row| args::print(&format!("{}\n", row.csv(&machine)));
            let picked = device::pick(&device, dtype)?;
            let name = match &picked {
                Picked::Cpu(backend, _) => format!("cpu {}", backend.instructions()),
                #[cfg(feature = "cuda")]
                Picked::Cuda(backend) => format!("cuda {}", backend.describe().replace(',', "")),
            };
            with_backend!(picked, |backend| bench::run(
                backend.with_path(path),
                &name,
                case,
                op.as_deref(),
                &mut print
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn case(text: &str) -> Result<Case> {
    let numbers: Option<Vec<usize>> = text.split(',').map(|n| n.parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[d_in, dict_size, batch, l0]) => Ok(Case { d_in, dict_size, batch, l0 }),
        _ => Err(Error::usage(format!("--case needs D_IN,DICT_SIZE,BATCH,L0, found '{text}'"))),
    }
}
