//! Working memory that is kept from one operation to the next, so that a training step allocates none after the first.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Vectors that are not in use, shared by clones of a backend.
#[derive(Debug)]
pub(super) struct Buffers<E>(Arc<Mutex<Vec<Vec<E>>>>);

impl<E> Clone for Buffers<E> {
    fn clone(&self) -> Self {
        Buffers(self.0.clone())
    }
}

impl<E> Default for Buffers<E> {
    fn default() -> Self {
        Buffers(Arc::default())
    }
}

/// Bytes of a cache line: slices begin at multiples, so that a vector load never touches two.
const LINE_BYTES: usize = 64;

/// More buffers than one operation uses; few enough that those of former shapes do not gather.
const MOST_UNUSED: usize = 32;

impl<E: Copy + Default> Buffers<E> {
    /// `len` elements, unspecified contents; they go back when dropped.
    pub(super) fn take(&self, len: usize) -> Buffer<E> {
        let needed = len + LINE_BYTES / size_of::<E>();
        let mut vec = {
            let mut unused = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The smallest that is large enough; otherwise a new one.
            let fitting = (0..unused.len()).filter(|&i| unused[i].len() >= needed).min_by_key(|&i| unused[i].len());
            if fitting.is_none() && unused.len() >= MOST_UNUSED {
                unused.clear(); // Shapes have changed: what is here has been too small for long.
            }
            fitting.map(|i| unused.swap_remove(i)).unwrap_or_default()
        };
        if vec.is_empty() {
            vec.resize(needed, E::default());
        }
        let start = vec.as_ptr().align_offset(LINE_BYTES).min(needed - len);
        Buffer { vec, start, len, home: self.clone() }
    }
}

/// See [`Buffers::take`].
pub(super) struct Buffer<E> {
    vec: Vec<E>,
    start: usize,
    len: usize,
    home: Buffers<E>,
}

impl<E> Deref for Buffer<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        &self.vec[self.start..self.start + self.len]
    }
}

impl<E> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.vec[self.start..self.start + self.len]
    }
}

impl<E> Drop for Buffer<E> {
    fn drop(&mut self) {
        let vec = std::mem::take(&mut self.vec);
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(vec);
    }
}

/// Vectors that grow as needed and keep their memory from one use to the next, shared by clones of a backend.
#[derive(Debug)]
pub(super) struct Scratch<E>(Arc<Mutex<Vec<Vec<E>>>>);

impl<E> Clone for Scratch<E> {
    fn clone(&self) -> Self {
        Scratch(self.0.clone())
    }
}

impl<E> Default for Scratch<E> {
    fn default() -> Self {
        Scratch(Arc::default())
    }
}

impl<E> Scratch<E> {
    /// A vector with unspecified contents; it goes back when dropped.
    pub(super) fn take(&self) -> ScratchVec<E> {
        let vec = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        ScratchVec { vec, home: self.clone() }
    }
}

/// See [`Scratch::take`].
pub(super) struct ScratchVec<E> {
    vec: Vec<E>,
    home: Scratch<E>,
}

impl<E> Deref for ScratchVec<E> {
    type Target = Vec<E>;
    fn deref(&self) -> &Vec<E> {
        &self.vec
    }
}

impl<E> DerefMut for ScratchVec<E> {
    fn deref_mut(&mut self) -> &mut Vec<E> {
        &mut self.vec
    }
}

impl<E> Drop for ScratchVec<E> {
    fn drop(&mut self) {
        let vec = std::mem::take(&mut self.vec);
        self.home.0.lock().unwrap_or_else(PoisonError::into_inner).push(vec);
    }
}
