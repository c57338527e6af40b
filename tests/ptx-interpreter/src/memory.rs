//! Global memory: allocations far apart from each other, so that whoever leaves one is seen.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

/// What fresh memory holds: nan in every float type.
const FRESH: u8 = 0xff;
/// Between allocations.
const GAP: u64 = 1 << 20;

pub(crate) struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    next: u64,
    used: usize,
    /// More is "out of memory".
    pub(crate) limit: usize,
}

struct Allocation {
    bytes: usize,
    at: *mut u8,
}

// SAFETY: the memory belongs to whoever holds the list.
unsafe impl Send for Allocation {}

/// The allocations at the time of a launch, ordered by address.
pub(crate) struct View(Vec<(u64, usize, *mut u8)>);

// SAFETY: the memory lives as long as the launch, during which nothing is freed. Blocks that write where others read do
// so on the device as well: then the kernel is wrong.
unsafe impl Sync for View {}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), 256).expect("a size that fits")
}

impl Memory {
    pub(crate) fn new() -> Self {
        Memory { allocations: BTreeMap::new(), next: 1 << 32, used: 0, limit: usize::MAX }
    }

    pub(crate) fn allocate(&mut self, bytes: usize) -> Option<u64> {
        if self.used.checked_add(bytes)? > self.limit {
            return None;
        }
        // SAFETY: the layout is not empty; the memory is filled to its length.
        let at = unsafe {
            let at = alloc(layout(bytes));
            if at.is_null() {
                return None;
            }
            at.write_bytes(FRESH, bytes);
            at
        };
        let address = self.next;
        self.next = (address + bytes as u64 + GAP).next_multiple_of(256);
        self.used += bytes;
        self.allocations.insert(address, Allocation { bytes, at });
        Some(address)
    }

    /// Whether there was an allocation at this address.
    pub(crate) fn free(&mut self, address: u64) -> bool {
        let Some(allocation) = self.allocations.remove(&address) else { return false };
        self.used -= allocation.bytes;
        // SAFETY: allocated with this layout, and no longer listed.
        unsafe { dealloc(allocation.at, layout(allocation.bytes)) };
        true
    }

    pub(crate) fn free_all(&mut self) {
        while let Some((&address, _)) = self.allocations.first_key_value() {
            self.free(address);
        }
    }

    pub(crate) fn available(&self) -> (usize, usize) {
        (self.limit - self.used, self.limit)
    }

    /// The host's pointer to `bytes` bytes at this address.
    pub(crate) fn host(&self, address: u64, bytes: usize) -> Option<*mut u8> {
        let (base, allocation) = self.allocations.range(..=address).next_back()?;
        let offset = (address - base) as usize;
        // SAFETY: within the allocation.
        (offset.checked_add(bytes)? <= allocation.bytes).then(|| unsafe { allocation.at.add(offset) })
    }

    pub(crate) fn view(&self) -> View {
        View(self.allocations.iter().map(|(&address, a)| (address, a.bytes, a.at)).collect())
    }
}

impl View {
    /// The host's pointer to `bytes` bytes at this address. `last` remembers the allocation between calls.
    #[inline]
    pub(crate) fn host(&self, address: u64, bytes: usize, last: &mut usize) -> Option<*mut u8> {
        let inside = |&(base, size, at): &(u64, usize, *mut u8)| {
            let offset = address.checked_sub(base)? as usize;
            // SAFETY: within the allocation.
            (offset.checked_add(bytes)? <= size).then(|| unsafe { at.add(offset) })
        };
        if let Some(found) = self.0.get(*last).and_then(inside) {
            return Some(found);
        }
        *last = self.0.partition_point(|a| a.0 <= address).checked_sub(1)?;
        inside(&self.0[*last])
    }
}
