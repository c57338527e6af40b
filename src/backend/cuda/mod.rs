//! The GPU: kernels from `ptx/`, launched through cust. No CUDA toolkit is needed to build, no driver to start.
//! (A crate that depends on this one with the feature `cuda` builds without a toolkit if it patches `find_cuda_helper` as this
//! repository's `Cargo.toml` does: cargo does not pass a patch on.)
//!
//! Everything stays on the device but batches, which go up, and numbers and rows of numbers, which come down. Elements
//! are stored in the dtype: every value of a matrix has been rounded to it. Sums have a fixed order (no atomics on
//! floats, grids whose sizes do not depend on the device), so a run repeats bit for bit, on any device of one kind.
//!
//! Elementwise formulas give the CPU's bits. Sums have another order than there, and products in half precision are
//! summed by tensor cores, which do not round to nearest.

mod driver;
mod matrix;

pub use matrix::{Latents, Matrix};

use super::{AdamStep, Backend, Precision, Scalar, Shaped, Support, Write};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::sparse::Path;
use crate::tensor::Values;
use driver::{Arg, Buffer, Gpu, Shape, Source, TENSOR_MAP};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

/// The modules. Where device or driver lack what one needs, the general ones must do; those are needed.
const SOURCES: [Source; 4] = [
    general("rows", include_str!("../../../ptx/rows.ptx")),
    general("latents", include_str!("../../../ptx/latents.ptx")),
    general("product", include_str!("../../../ptx/product.ptx")),
    // PTX 8.0 for `sm_90a`, which later devices do not take.
    Source {
        name: "hopper",
        ptx: include_str!("../../../ptx/hopper.ptx"),
        capability: (9, 0),
        exact: true,
        cuda: (12, 0),
        functions: &[TENSOR_MAP],
    },
];

/// PTX 7.0 for `sm_80`: drivers from CUDA 11.0 on, devices from Ampere on.
const fn general(name: &'static str, ptx: &'static str) -> Source {
    Source { name, ptx, capability: (8, 0), exact: false, cuda: (11, 0), functions: &[] }
}

/// Threads of a block, `BLOCK` in `ptx/common.cuh`.
const BLOCK: usize = 128;
/// A product's tile and the threads that make it, in half precision and otherwise: `TILE`, `Whole` and `THREADS` in
/// `ptx/product.cu`.
const TILE: usize = 128;
const HALF_THREADS: u32 = 128;
const PRODUCT_THREADS: u32 = 256;
/// Tensor cores: four tiles of both operands, 8 KiB each, or the sums, 128 rows of 136 float32, whichever is more.
const MMA_BYTES: u32 = 128 * 136 * 4;
/// Split products: three tiles of both parts of both operands.
const SPLIT_BYTES: u32 = 3 * 4 * (8 << 10);
/// Rows of more bytes are read twice where they are split, once otherwise: that much shared memory need not be asked for.
const SPLIT_ROW_BYTES: usize = 47 << 10;
/// Hopper's products, from `ptx/hopper.cu`: rows and columns of a tile, threads, and shared memory: stages of both
/// operands' tiles, 64 deep, and 16 bytes of barriers for each.
const HOPPER_ROWS: usize = 128;
const HOPPER_K: u32 = 64;
const HOPPER_THREADS: u32 = 384;
const HOPPER_HALF: Hopper = Hopper { columns: 256, shared_bytes: 4 * ((128 + 256) * 64 * 2 + 16) };
const HOPPER_SPLIT: Hopper = Hopper { columns: 128, shared_bytes: 3 * (2 * (128 + 128) * 64 * 2 + 16) };

struct Hopper {
    columns: usize,
    shared_bytes: u32,
}

/// Rows that one thread sums in a column sum's first pass.
const COLUMN_ROWS: usize = 64;
/// A sum over all elements is made by one block for so many, and by so many blocks at most. The elements' number alone decides,
/// so that the order of terms does not depend on the device.
const NORM_ELEMENTS: usize = 4096;
const NORM_BLOCKS: usize = 1024;

/// Latents are held as a support where at most this share of them is not zero, in float32 and in half precision: where a
/// training step took as long either way on an H100 (ptx/RESULTS.md). The first is with Hopper's products. The second, without
/// them, is computed from their steps at a share of 0.005, and from 6.3 and 3.2 ms more for each hundredth, as with them.
const SPARSE_SHARE: [f64; 2] = [0.023, 0.04];
const SPARSE_SHARE_HALF: [f64; 2] = [0.0105, 0.019];

/// Products of fewer multiplications than this are made by fused multiply-adds: as fast there on an H100, and simpler.
const SPLIT_FROM: usize = 1 << 24;

/// How float32 products of a whole matrix are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Product {
    /// [`Product::Split`] for large products, [`Product::Ffma`] otherwise.
    #[default]
    Auto,
    /// By float32 fused multiply-adds.
    Ffma,
    /// By tensor cores, each factor being the sum of two float16 numbers, scaled by row. Where an operand is not
    /// finite, as [`Product::Ffma`].
    Split,
}

/// A backend on one GPU.
#[derive(Clone)]
pub struct Cuda {
    gpu: Gpu,
    dtype: Dtype,
    path: Path,
    product: Product,
    hopper: bool,
}

impl Cuda {
    /// Device `ordinal`, counted from 0, storing and rounding in `dtype`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Device`], with the reason: `no NVIDIA driver`, `no device`, `driver too old for this module`, …
    ///
    /// # Panics
    /// If `dtype` is not a float type that a crosscoder can have.
    pub fn new(ordinal: usize, dtype: Dtype) -> Result<Self> {
        assert!(dtype.enc_name().is_some(), "a crosscoder cannot have the type {dtype}");
        let ordinal = u32::try_from(ordinal).map_err(|_| Error::usage(format!("no device {ordinal}")))?;
        let gpu = Gpu::open(ordinal, &SOURCES)?;
        let hopper = gpu.has("hopper_nt_f16");
        Ok(Cuda { gpu, dtype, path: Path::Auto, product: Product::Auto, hopper })
    }

    /// The same backend, holding latents this way.
    pub fn with_path(self, path: Path) -> Self {
        Cuda { path, ..self }
    }

    /// The same backend, making float32 products this way.
    pub fn with_product(self, product: Product) -> Self {
        Cuda { product, ..self }
    }

    /// The same backend, making products by the general modules alone, also where the device has its own: to compare them.
    pub fn with_general_products(self) -> Self {
        Cuda { hopper: false, ..self }
    }

    /// The device in words: `NVIDIA H100 80GB HBM3, compute capability 9.0`.
    pub fn describe(&self) -> String {
        let (major, minor) = self.gpu.capability();
        format!("{}, compute capability {major}.{minor}", self.gpu.name())
    }

    /// Launches the variant of `kernel` for the dtype.
    fn launch(&self, kernel: &str, grid: (usize, usize), args: &[Arg]) -> Result<()> {
        self.launch_plain(&format!("{kernel}_{}", self.suffix()), grid, args)
    }

    /// The dtype in the names of kernels.
    fn suffix(&self) -> &'static str {
        match self.dtype {
            Dtype::F16 => "f16",
            Dtype::BF16 => "bf16",
            _ => "f32",
        }
    }

    /// Launches a kernel of [`BLOCK`] threads a block.
    fn launch_plain(&self, kernel: &str, grid: (usize, usize), args: &[Arg]) -> Result<()> {
        self.gpu.launch(kernel, Shape { grid, threads: BLOCK as u32, shared_bytes: 0 }, args)
    }

    fn words(&self, n: usize) -> Result<Buffer> {
        self.gpu.buffer(n.checked_mul(4).ok_or_else(too_large)?)
    }

    fn elements(&self, n: usize) -> Result<Buffer> {
        self.gpu.buffer(n.checked_mul(self.dtype.size_bytes()).ok_or_else(too_large)?)
    }

    /// Elements in 16 bytes.
    fn lanes(&self) -> usize {
        16 / self.dtype.size_bytes()
    }

    /// Blocks whose threads take 16 bytes of `n` elements each.
    fn blocks(&self, n: usize) -> usize {
        n.div_ceil(BLOCK * self.lanes())
    }

    /// Has `m` hold [rows, cols], contents unspecified if that is another size than before.
    fn overwrite(&self, m: &mut Matrix, rows: usize, cols: usize) -> Result<()> {
        // Kernels count rows and columns in 32 bits, with room to go beyond the end by a tile.
        if rows.max(cols) > (u32::MAX >> 1) as usize {
            return Err(too_large());
        }
        let elements = rows.checked_mul(cols).ok_or_else(too_large)?;
        if m.rows * m.cols != elements || m.data.is_none() {
            m.data = None; // First, so that its memory can be used again.
            m.data = Some(self.elements(elements)?);
        }
        (m.rows, m.cols) = (rows, cols);
        m.nonfinite = Default::default();
        Ok(())
    }

    /// A word on the device that is not 0 if `m` has an element that is not finite. Asked for once per value of `m`.
    fn nonfinite<'a>(&self, m: &'a Matrix) -> Result<&'a Buffer> {
        if let Some(flag) = m.nonfinite.get() {
            return Ok(flag);
        }
        let flag = self.words(1)?;
        self.gpu.zero(&flag)?;
        let n = m.rows * m.cols;
        self.launch(
            "nonfinite",
            (n.div_ceil(NORM_ELEMENTS).min(NORM_BLOCKS), 1),
            &[u64_arg(n), m.arg(), (&flag).into()],
        )?;
        // Another thread may have been first: then both are right.
        Ok(m.nonfinite.get_or_init(|| flag))
    }

    /// The numbers that `launch` writes for each row.
    fn per_row(&self, rows: usize, launch: impl FnOnce(Arg) -> Result<()>) -> Result<Vec<f32>> {
        let out = self.words(rows)?;
        launch((&out).into())?;
        let mut values = vec![0.0; rows];
        self.gpu.read(&out, 0, &mut values)?;
        Ok(values)
    }

    /// Copies elements in the dtype, from element `at` on, to the host.
    fn read_elements(&self, data: &Buffer, at: usize, out: &mut [f32]) -> Result<()> {
        match self.dtype {
            Dtype::F16 => {
                let mut raw = vec![f16::ZERO; out.len()];
                self.gpu.read(data, at, &mut raw)?;
                out.iter_mut().zip(raw).for_each(|(o, v)| *o = v.to_f32());
            }
            Dtype::BF16 => {
                let mut raw = vec![bf16::ZERO; out.len()];
                self.gpu.read(data, at, &mut raw)?;
                out.iter_mut().zip(raw).for_each(|(o, v)| *o = v.to_f32());
            }
            _ => self.gpu.read(data, at, out)?,
        }
        Ok(())
    }

    /// `c = finish(a · b)` by the kernel for `layout`: [m, n] from k terms each.
    fn product(&self, layout: Layout, [m, n, k]: [usize; 3], a: Arg, b: Arg, finish: &Finish) -> Result<()> {
        let name = layout.name();
        if self.dtype != Dtype::F32 && self.on_hopper(layout, [m, n, k]) {
            let maps = self.maps(layout, [m, n, k], &[(a, b)], &HOPPER_HALF)?;
            let kernel = format!("hopper_{name}_{}", self.suffix());
            return self.product_hopper(&kernel, [m, n, k], &maps, finish, &HOPPER_HALF);
        }
        let large = m.saturating_mul(n).saturating_mul(k) >= SPLIT_FROM;
        let split = match self.product {
            Product::Auto => large,
            Product::Ffma => false,
            Product::Split => true,
        };
        let only_if = match split && self.dtype == Dtype::F32 && k > 0 {
            true => Some(self.product_split(layout, [m, n, k], a, b, finish)?),
            false => None,
        };
        let (threads, shared_bytes) =
            if self.dtype == Dtype::F32 { (PRODUCT_THREADS, 0) } else { (HALF_THREADS, MMA_BYTES) };
        let shape = Shape { grid: (m.div_ceil(TILE), n.div_ceil(TILE)), threads, shared_bytes };
        let [bias, mask, relu, add, c] = finish.args();
        let args = [u32_arg(m), u32_arg(n), u32_arg(k), a, b, only_if.as_ref().into(), bias, mask, relu, add, c];
        self.gpu.launch(&format!("product_{name}_{}", self.suffix()), shape, &args)
    }

    /// The product of split operands, unless one is not finite: then the word that is returned is not 0.
    fn product_split(&self, layout: Layout, [m, n, k]: [usize; 3], a: Arg, b: Arg, finish: &Finish) -> Result<Buffer> {
        let nonfinite = self.words(1)?;
        self.gpu.zero(&nonfinite)?;
        let flag = Arg::from(&nonfinite);
        let (a_k, b_k) = layout.k_minor();
        let (a, b) = (self.split(a_k, m, k, a, flag)?, self.split(b_k, n, k, b, flag)?);
        let ([a_high, a_low, a_shift], [b_high, b_low, b_shift]) =
            (a.each_ref().map(Arg::from), b.each_ref().map(Arg::from));
        // The sizes that the split operands have.
        let padded = [pad(m, !a_k), pad(n, !b_k), pad(k, true)];
        if self.on_hopper(layout, padded) {
            let maps = self.maps(layout, padded, &[(a_high, b_high), (a_low, b_low)], &HOPPER_SPLIT)?;
            let args = [maps[0], maps[2], a_shift, maps[1], maps[3], b_shift, flag];
            let kernel = format!("hopper_{}_split", layout.name());
            self.product_hopper(&kernel, [m, n, padded[2]], &args, finish, &HOPPER_SPLIT)?;
            return Ok(nonfinite);
        }
        let shape =
            Shape { grid: (m.div_ceil(TILE), n.div_ceil(TILE)), threads: PRODUCT_THREADS, shared_bytes: SPLIT_BYTES };
        let mut args: Vec<Arg> = padded.into_iter().chain([m, n]).map(u32_arg).collect();
        args.extend([a_high, a_low, a_shift, b_high, b_low, b_shift, flag]);
        args.extend(finish.args());
        self.gpu.launch(&format!("product_{}_split", layout.name()), shape, &args)?;
        Ok(nonfinite)
    }

    /// An operand of `rows` rows of k elements as high and low parts and a shift for each row, see `ptx/product.cu`; sets `flag`
    /// if an element is not finite.
    fn split(&self, k_minor: bool, rows: usize, k: usize, operand: Arg, flag: Arg) -> Result<[Buffer; 3]> {
        let (padded_rows, padded_k) = (pad(rows, !k_minor), pad(k, true));
        let bytes = padded_rows.checked_mul(padded_k).and_then(|n| n.checked_mul(2)).ok_or_else(too_large)?;
        let parts = [self.gpu.buffer(bytes)?, self.gpu.buffer(bytes)?, self.words(rows)?];
        let [high, low, shift] = parts.each_ref().map(Arg::from);
        if k_minor {
            let row_bytes = 4 * padded_k;
            let keep = row_bytes <= SPLIT_ROW_BYTES;
            let args = [u32_arg(k), u32_arg(padded_k), keep.into(), operand, high, low, shift, flag];
            let shared_bytes = if keep { row_bytes as u32 } else { 0 };
            self.gpu.launch("split_rows", Shape { grid: (rows, 1), threads: BLOCK as u32, shared_bytes }, &args)?;
        } else {
            let largest = self.words(rows)?;
            self.gpu.zero(&largest)?;
            let args = [u32_arg(k), u32_arg(rows), operand, (&largest).into()];
            self.launch_plain("column_largest", (rows.div_ceil(BLOCK), k.div_ceil(COLUMN_ROWS)), &args)?;
            let sizes = [k, rows, padded_rows].map(u32_arg);
            let args = [&sizes[..], &[operand, (&largest).into(), high, low, shift, flag]].concat();
            self.launch_plain("split_columns", (padded_k, padded_rows.div_ceil(4 * BLOCK)), &args)?;
        }
        Ok(parts)
    }

    /// Whether Hopper's products can make this one: the module is there and wanted, and rows in memory are a multiple of 16
    /// bytes, none empty.
    fn on_hopper(&self, layout: Layout, [m, n, k]: [usize; 3]) -> bool {
        let (a_k, b_k) = layout.k_minor();
        let widths = [if a_k { k } else { m }, if b_k { k } else { n }];
        self.hopper && widths.iter().all(|width| width.is_multiple_of(8)) && m.min(n).min(k) > 0
    }

    /// Tensor maps for pairs of operands of m and n rows, in this order.
    fn maps(&self, layout: Layout, [m, n, k]: [usize; 3], pairs: &[(Arg, Arg)], shape: &Hopper) -> Result<Vec<Arg>> {
        let (a_k, b_k) = layout.k_minor();
        let map = |k_minor: bool, operand, rows, tile| match k_minor {
            true => self.gpu.tensor_map(operand, rows, k, tile as u32),
            false => self.gpu.tensor_map(operand, k, rows, HOPPER_K),
        };
        let mut maps = Vec::new();
        for &(a, b) in pairs {
            maps.push(map(a_k, a, m, HOPPER_ROWS)?);
            maps.push(map(b_k, b, n, shape.columns)?);
        }
        Ok(maps)
    }

    fn product_hopper(
        &self,
        kernel: &str,
        [m, n, k]: [usize; 3],
        operands: &[Arg],
        finish: &Finish,
        shape: &Hopper,
    ) -> Result<()> {
        let args = [&[u32_arg(m), u32_arg(n), u32_arg(k)], operands, &finish.args()].concat();
        let grid = (m.div_ceil(HOPPER_ROWS), n.div_ceil(shape.columns));
        let shape = Shape { grid, threads: HOPPER_THREADS, shared_bytes: shape.shared_bytes };
        self.gpu.launch(kernel, shape, &args)
    }

    /// `c = finish(x · wᵀ)`.
    fn linear_into(&self, x: &Matrix, w: &Matrix, finish: &Finish) -> Result<()> {
        assert_eq!(x.cols, w.cols, "both have rows of one width");
        self.product(Layout::Nt, [x.rows, w.rows, x.cols], x.arg(), w.arg(), finish)
    }

    /// Latents from dense values, in the form that the path asks for.
    fn hold(&self, rows: usize, cols: usize, dense: Buffer, out: &mut Latents) -> Result<()> {
        (out.rows, out.cols) = (rows, cols);
        (out.support, out.values) = (None, None);
        if self.path != Path::Dense
            && let Some((support, values)) = self.compact(rows, cols, &dense)?
        {
            (out.support, out.values) = (Some(Arc::new(support)), Some(values));
        } else {
            out.values = Some(dense);
        }
        Ok(())
    }

    /// The support of dense latents with its values; none if it is too large to be worth it.
    fn compact(&self, rows: usize, cols: usize, dense: &Buffer) -> Result<Option<(matrix::Support, Buffer)>> {
        let (row_words, col_words) = (cols.div_ceil(32), rows.div_ceil(32));
        let row_bits = self.words(rows * row_words)?;
        let col_bits = self.words(col_words * cols)?;
        let before = self.words(col_words * cols)?;
        let (row_counts, col_counts) = (self.words(rows)?, self.words(cols)?);
        let (starts, col_starts) = (self.words(rows + 1)?, self.words(cols + 1)?);
        let grid = (row_words.div_ceil(BLOCK / 32), col_words);
        let [r, c, b] = [&row_bits, &col_bits, &before].map(Arg::from);
        self.launch("support_bits", grid, &[u32_arg(rows), u32_arg(cols), dense.into(), r, c])?;
        self.launch_plain("row_counts", (rows, 1), &[u32_arg(row_words), r, (&row_counts).into()])?;
        let args = [u32_arg(col_words), u32_arg(cols), c, b, (&col_counts).into()];
        self.launch_plain("column_counts", (cols.div_ceil(BLOCK), 1), &args)?;
        self.launch_plain("starts", (1, 1), &[u32_arg(rows), (&row_counts).into(), (&starts).into()])?;
        self.launch_plain("starts", (1, 1), &[u32_arg(cols), (&col_counts).into(), (&col_starts).into()])?;

        let mut total = [0u32];
        self.gpu.read(&starts, rows, &mut total)?;
        let entries = total[0] as usize;
        let shares = if self.dtype == Dtype::F32 { SPARSE_SHARE } else { SPARSE_SHARE_HALF };
        let share = if self.hopper { shares[0] } else { shares[1] };
        let too_many = self.path == Path::Auto && entries as f64 > share * (rows * cols) as f64;
        if too_many || u32::try_from(rows * cols).is_err() {
            return Ok(None); // Entries are counted in 32 bits.
        }
        let columns = self.words(entries)?;
        let (col_rows, col_entries) = (self.words(entries)?, self.words(entries)?);
        let values = self.elements(entries)?;
        let outputs = [&starts, &col_starts, &columns, &values, &col_rows, &col_entries].map(Arg::from);
        let args = [&[u32_arg(cols), dense.into(), r, c, b], &outputs[..]].concat();
        self.launch("support_fill", (rows, 1), &args)?;
        Ok(Some((matrix::Support { entries, starts, columns, col_starts, col_rows, col_entries }, values)))
    }

    /// `out[k] = r((Σ_b v(m[b, k])) / divisor)`, `v(a) = r(g · a)` if there is a `g`.
    fn column_sums_of(
        &self,
        (rows, cols): (usize, usize),
        m: Arg,
        g: Option<f32>,
        divisor: f32,
        out: &mut Matrix,
    ) -> Result<()> {
        self.overwrite(out, 1, cols)?;
        let chunks = rows.div_ceil(COLUMN_ROWS);
        let parts = self.words(chunks * cols)?;
        let (scaled, g) = (g.is_some().into(), g.unwrap_or(1.0).into());
        let args = [u32_arg(rows), u32_arg(cols), u32_arg(COLUMN_ROWS), m, scaled, g, (&parts).into()];
        self.launch("column_parts", (cols.div_ceil(BLOCK), chunks), &args)?;
        let args = [u32_arg(chunks), u32_arg(cols), (&parts).into(), divisor.into(), out.arg()];
        self.launch("column_total", (cols.div_ceil(BLOCK), 1), &args)
    }

    /// `out[h] = r(Σ_b v(latents[b, h]))`, `v(a) = r(g · a)` if there is a `g`.
    fn latents_column_sums_of(&self, latents: &Latents, g: Option<f32>, out: &mut Matrix) -> Result<()> {
        let Some(support) = &latents.support else {
            return self.column_sums_of(latents.shape(), latents.values(), g, 1.0, out);
        };
        self.overwrite(out, 1, latents.cols)?;
        let args = [
            u32_arg(latents.cols),
            (&support.col_starts).into(),
            (&support.col_entries).into(),
            latents.values(),
            g.is_some().into(),
            g.unwrap_or(1.0).into(),
            out.arg(),
        ];
        self.launch("support_column_sums", (latents.cols.div_ceil(BLOCK / 32), 1), &args)
    }
}

/// How the operands of a product lie; see `ptx/product.cu`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Nt,
    Nn,
    Tn,
}

impl Layout {
    fn name(self) -> &'static str {
        match self {
            Layout::Nt => "nt",
            Layout::Nn => "nn",
            Layout::Tn => "tn",
        }
    }

    /// Whether k runs along the rows in memory, of a and of b.
    fn k_minor(self) -> (bool, bool) {
        (self != Layout::Tn, self == Layout::Nt)
    }
}

/// The next multiple of 8 if `padded`.
fn pad(n: usize, padded: bool) -> usize {
    if padded { n.next_multiple_of(8) } else { n }
}

/// What a product does with its sums; see `Finish` in `ptx/product.cu`.
struct Finish {
    bias: Arg,
    mask: Arg,
    relu: bool,
    add: bool,
    c: Arg,
}

impl Finish {
    fn args(&self) -> [Arg; 5] {
        [self.bias, self.mask, self.relu.into(), self.add.into(), self.c]
    }
}

fn too_large() -> Error {
    Error::unsupported("a matrix of this size; the kernels count rows and columns in 31 bits")
}

/// A count that `Cuda::overwrite` has found to fit.
fn u32_arg(n: usize) -> Arg {
    u32::try_from(n).expect("sizes are checked where memory is asked for").into()
}

fn u64_arg(n: usize) -> Arg {
    (n as u64).into()
}

impl Backend for Cuda {
    type Scalar = f32;
    type Matrix = Matrix;
    type Latents = Latents;

    const AHEAD: bool = true;

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn upload(&self, rows: usize, cols: usize, values: Values) -> Result<Matrix> {
        assert_eq!(values.len(), rows * cols, "as many values as the shape has");
        let mut out = Matrix::default();
        self.overwrite(&mut out, rows, cols)?;
        let data = out.data.as_ref().expect("given memory above");
        match values.cast(self.dtype)? {
            Values::F32(v) => self.gpu.write(data, &v)?,
            Values::F16(v) => self.gpu.write(data, &v)?,
            Values::BF16(v) => self.gpu.write(data, &v)?,
            other => unreachable!("cast to {} gave {}", self.dtype, other.dtype()),
        }
        Ok(out)
    }

    fn fill(&self, rows: usize, cols: usize, values: &[f32], out: &mut Matrix) -> Result<()> {
        assert_eq!(values.len(), rows * cols, "as many values as the shape has");
        self.overwrite(out, rows, cols)?;
        let to = out.data.as_ref().expect("given memory above");
        match self.dtype {
            Dtype::F16 => self.gpu.upload(values, f16::from_f32, to),
            Dtype::BF16 => self.gpu.upload(values, bf16::from_f32, to),
            _ => self.gpu.upload(values, |v| v, to),
        }
    }

    fn download(&self, m: &Matrix, at: usize, out: &mut [f32]) -> Result<()> {
        let Some(data) = &m.data else {
            assert!(out.is_empty(), "a matrix without elements has none to copy");
            return Ok(());
        };
        self.read_elements(data, at, out)
    }

    fn linear(&self, x: &Matrix, w: &Matrix, b: &Matrix, out: &mut Matrix) -> Result<()> {
        self.overwrite(out, x.rows, w.rows)?;
        self.linear_into(x, w, &Finish { bias: b.arg(), mask: Arg::NULL, relu: false, add: false, c: out.arg() })
    }

    fn encode(&self, x: &Matrix, w: &Matrix, b: &Matrix, out: &mut Latents) -> Result<()> {
        let mut dense = Matrix::default();
        self.overwrite(&mut dense, x.rows, w.rows)?;
        self.linear_into(x, w, &Finish { bias: b.arg(), mask: Arg::NULL, relu: true, add: false, c: dense.arg() })?;
        self.hold(x.rows, w.rows, dense.data.expect("given memory above"), out)
    }

    fn to_latents(&self, dense: &Matrix, out: &mut Latents) -> Result<()> {
        let mut copy = Matrix::default();
        self.overwrite(&mut copy, dense.rows, dense.cols)?;
        let copy = copy.data.expect("given memory above");
        if let Some(data) = &dense.data {
            self.gpu.copy(data, &copy)?;
        }
        self.hold(dense.rows, dense.cols, copy, out)
    }

    fn to_dense(&self, latents: &Latents, out: &mut Matrix) -> Result<()> {
        self.overwrite(out, latents.rows, latents.cols)?;
        let to = out.data.as_ref().expect("given memory above");
        match &latents.support {
            None => latents.values.as_ref().map_or(Ok(()), |values| self.gpu.copy(values, to)),
            Some(support) => {
                self.gpu.zero(to)?;
                let args = [
                    u32_arg(latents.cols),
                    (&support.starts).into(),
                    (&support.columns).into(),
                    latents.values(),
                    to.into(),
                ];
                self.launch("scatter", (latents.rows, 1), &args)
            }
        }
    }

    fn support(&self, latents: &Latents) -> Result<Support<f32>> {
        let held = latents.support.as_ref().map_or(latents.rows * latents.cols, |support| support.entries);
        let mut values = vec![0.0; held];
        if let Some(data) = &latents.values {
            self.read_elements(data, 0, &mut values)?;
        }
        let (mut starts, mut columns) = (vec![0u32; latents.rows + 1], Vec::new());
        if let Some(support) = &latents.support {
            columns.resize(held, 0u32);
            self.gpu.read(&support.starts, 0, &mut starts)?;
            self.gpu.read(&support.columns, 0, &mut columns)?;
        }
        let mut out = Support { starts: vec![0], ..Support::default() };
        for row in 0..latents.rows {
            let entries = match &latents.support {
                Some(_) => starts[row] as usize..starts[row + 1] as usize,
                None => row * latents.cols..(row + 1) * latents.cols,
            };
            // A gradient may be 0 on its support.
            for e in entries.clone().filter(|&e| values[e] != 0.0) {
                out.columns.push(columns.get(e).map_or((e - entries.start) as u32, |&column| column));
                out.values.push(values[e]);
            }
            out.starts.push(out.columns.len());
        }
        Ok(out)
    }

    fn decode(&self, acts: &Latents, w: &Matrix, b: &Matrix, out: &mut Matrix) -> Result<()> {
        assert_eq!(acts.cols, w.rows, "as many latents as the decoder has");
        self.overwrite(out, acts.rows, w.cols)?;
        let Some(support) = &acts.support else {
            let finish = Finish { bias: b.arg(), mask: Arg::NULL, relu: false, add: false, c: out.arg() };
            return self.product(Layout::Nn, [acts.rows, w.cols, w.rows], acts.values(), w.arg(), &finish);
        };
        let args = [
            u32_arg(w.rows),
            u32_arg(w.cols),
            (&support.starts).into(),
            (&support.columns).into(),
            Arg::NULL,
            acts.values(),
            w.arg(),
            self.nonfinite(w)?.into(),
            b.arg(),
            false.into(),
            out.arg(),
        ];
        self.launch("gather", (acts.rows, self.blocks(w.cols)), &args)
    }

    fn latents_grad(&self, d: &Matrix, w: &Matrix, acts: &Latents, write: Write, out: &mut Latents) -> Result<()> {
        assert_eq!((d.rows, d.cols, acts.cols), (acts.rows, w.cols, w.rows), "shapes of a product d · wᵀ");
        if write == Write::Set {
            self.like(acts, out)?;
        }
        let add = write == Write::Add;
        let Some(support) = &acts.support else {
            let finish = Finish { bias: Arg::NULL, mask: acts.values(), relu: false, add, c: out.values() };
            return self.linear_into(d, w, &finish);
        };
        let (tiles, entries) = (self.blocks(w.cols), support.entries);
        let parts = self.words(tiles.checked_mul(entries).ok_or_else(too_large)?)?;
        let [starts, columns] = acts.by_row();
        let args = [u32_arg(w.cols), u32_arg(entries), starts, columns, d.arg(), w.arg(), (&parts).into()];
        self.launch("latents_grad_parts", (acts.rows, tiles), &args)?;
        let args = [u32_arg(tiles), u32_arg(entries), (&parts).into(), acts.values(), add.into(), out.values()];
        self.launch("latents_grad_total", (entries.div_ceil(BLOCK), 1), &args)
    }

    fn weight_grad(&self, latents: &Latents, y: &Matrix, write: Write, out: &mut Matrix) -> Result<()> {
        assert_eq!(latents.rows, y.rows, "as many rows of latents as of y");
        let (rows, cols, add) = (latents.cols, y.cols, write == Write::Add);
        assert!(!add || out.shape() == (rows, cols), "a sum has the shape of its terms");
        self.overwrite(out, rows, cols)?;
        let Some(support) = &latents.support else {
            let finish = Finish { bias: Arg::NULL, mask: Arg::NULL, relu: false, add, c: out.arg() };
            return self.product(Layout::Tn, [rows, cols, y.rows], latents.values(), y.arg(), &finish);
        };
        let args = [
            u32_arg(y.rows),
            u32_arg(cols),
            (&support.col_starts).into(),
            (&support.col_rows).into(),
            (&support.col_entries).into(),
            latents.values(),
            y.arg(),
            self.nonfinite(y)?.into(),
            Arg::NULL,
            add.into(),
            out.arg(),
        ];
        self.launch("gather", (rows, self.blocks(cols)), &args)
    }

    fn latents_column_sums(&self, latents: &Latents, out: &mut Matrix) -> Result<()> {
        self.latents_column_sums_of(latents, None, out)
    }

    fn weighted_sums(&self, acts: &Latents, t: &Matrix) -> Result<Vec<f32>> {
        let [starts, columns] = acts.by_row();
        let nonfinite = self.nonfinite(t)?.into();
        self.per_row(acts.rows, |out| {
            let args = [u32_arg(acts.cols), starts, columns, acts.values(), t.arg(), nonfinite, out];
            self.launch("weighted_sums", (acts.rows, 1), &args)
        })
    }

    fn weighted_sums_grad(
        &self,
        acts: &Latents,
        t: &Matrix,
        g: f32,
        d_acts: &mut Latents,
        d_t: &mut Matrix,
    ) -> Result<()> {
        self.like(acts, d_acts)?;
        let [starts, columns] = acts.by_row();
        let args = [u32_arg(acts.cols), starts, columns, acts.values(), t.arg(), g.into(), d_acts.values()];
        self.launch("weighted_sums_grad", (acts.rows, 1), &args)?;
        self.latents_column_sums_of(acts, Some(g), d_t)
    }

    fn active_counts(&self, acts: &Latents) -> Result<Vec<f32>> {
        let [starts, _] = acts.by_row();
        self.per_row(acts.rows, |out| {
            self.launch("active_counts", (acts.rows, 1), &[u32_arg(acts.cols), starts, acts.values(), out])
        })
    }

    fn column_sums(&self, m: &Matrix, out: &mut Matrix) -> Result<()> {
        self.column_sums_of(m.shape(), m.arg(), None, 1.0, out)
    }

    fn column_means(&self, m: &Matrix, out: &mut Matrix) -> Result<()> {
        self.column_sums_of(m.shape(), m.arg(), None, m.rows as f32, out)
    }

    fn squared_distances(&self, a: &Matrix, b: &Matrix, cols: Range<usize>, precision: Precision) -> Result<Vec<f32>> {
        assert!(a.cols == b.cols && (b.rows == a.rows || b.rows == 1), "b has the shape of a, or one row");
        self.per_row(a.rows, |out| {
            let args = [
                u32_arg(a.cols),
                u32_arg(cols.start),
                u32_arg(cols.end),
                a.arg(),
                b.arg(),
                (b.rows == 1).into(),
                (precision == Precision::Dtype).into(),
                out,
            ];
            self.launch("squared_distances", (a.rows, 1), &args)
        })
    }

    fn squared_distances_grad(&self, a: &Matrix, b: &Matrix, g: f32, out: &mut Matrix) -> Result<()> {
        assert_eq!(a.shape(), b.shape(), "both of one shape");
        self.overwrite(out, a.rows, a.cols)?;
        let n = a.rows * a.cols;
        let args = [u64_arg(n), a.arg(), b.arg(), g.into(), out.arg()];
        self.launch("squared_distances_grad", (self.blocks(n), 1), &args)
    }

    fn group_norms(&self, w: &Matrix, groups: usize, out: &mut Matrix) -> Result<()> {
        self.overwrite(out, w.rows, groups)?;
        let args = [u32_arg(w.cols / groups), w.arg(), out.arg()];
        self.launch("group_norms", (w.rows * groups, 1), &args)
    }

    fn row_sums(&self, m: &Matrix, out: &mut Matrix) -> Result<()> {
        self.overwrite(out, 1, m.rows)?;
        self.launch("row_sums", (m.rows, 1), &[u32_arg(m.cols), m.arg(), out.arg()])
    }

    fn group_norms_grad(&self, w: &Matrix, norms: &Matrix, d_t: &Matrix, write: Write, out: &mut Matrix) -> Result<()> {
        let (groups, add) = (norms.cols, write == Write::Add);
        assert!(!add || out.shape() == w.shape(), "a sum has the shape of its terms");
        self.overwrite(out, w.rows, w.cols)?;
        let d = u32_arg(w.cols / groups);
        let args = [d, u32_arg(groups), w.arg(), norms.arg(), d_t.arg(), add.into(), out.arg()];
        self.launch("group_norms_grad", (w.rows * groups, 1), &args)
    }

    fn norm(&self, m: &Matrix) -> Result<f32> {
        let n = m.rows * m.cols;
        let blocks = n.div_ceil(NORM_ELEMENTS).clamp(1, NORM_BLOCKS);
        let parts = self.per_row(blocks, |out| self.launch("norm_parts", (blocks, 1), &[u64_arg(n), m.arg(), out]))?;
        let total: f64 = parts.iter().map(|v| f64::from(*v)).sum();
        Ok(self.round(f32::narrow(total.sqrt())))
    }

    fn adam(&self, p: &mut Matrix, g: &Matrix, m: &mut Matrix, v: &mut Matrix, step: &AdamStep<f32>) -> Result<()> {
        assert!([g.shape(), m.shape(), v.shape()] == [p.shape(); 3], "all of one shape");
        [&mut *p, &mut *m, &mut *v].into_iter().for_each(|changed| changed.nonfinite = Default::default());
        let n = p.rows * p.cols;
        let mut args = vec![u64_arg(n), p.arg(), g.arg(), m.arg(), v.arg()];
        args.extend(
            [
                step.clip,
                step.one_minus_beta1,
                step.beta2,
                step.one_minus_beta2,
                step.step_size,
                step.bias_correction2_sqrt,
                step.eps,
            ]
            .map(Arg::from),
        );
        self.launch("adam", (self.blocks(n), 1), &args)
    }
}

impl Cuda {
    /// Gives `out` the shape and the support of `acts`; values unspecified.
    fn like(&self, acts: &Latents, out: &mut Latents) -> Result<()> {
        (out.rows, out.cols) = (acts.rows, acts.cols);
        out.values = None;
        out.support = acts.support.clone();
        let held = acts.support.as_ref().map_or(acts.rows * acts.cols, |support| support.entries);
        out.values = Some(self.elements(held)?);
        Ok(())
    }
}
