//! What the program asks of its allocator.
#![expect(unsafe_code, reason = "options of mimalloc and of the kernel are set through C interfaces")]

use mimalloc as _; // linked even where it is not the global allocator
use std::ffi::{c_int, c_long};

/// `mi_option_purge_delay` of mimalloc 2 and 3: milliseconds until freed memory is returned.
const PURGE_DELAY: c_int = 15;
/// `mi_option_arena_purge_mult`: how much later that of large blocks is.
const ARENA_PURGE_FACTOR: c_int = 24;
/// Never.
const NEVER: c_long = -1;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// Keeps freed memory instead of returning it to the system: every training step allocates the same buffers, and the
/// system would clear each page again.
pub fn keep_memory() {
    set(PURGE_DELAY, NEVER);
    small_pages();
}

/// Returns freed memory almost at once: large images leave large holes, and their peak is what a machine must have.
pub fn return_memory() {
    set(PURGE_DELAY, 1);
    set(ARENA_PURGE_FACTOR, 1);
    small_pages();
}

fn set(option: c_int, value: c_long) {
    // SAFETY: the function of the linked mimalloc takes two integers, at any time.
    unsafe { mi_option_set(option, value) };
}

/// Asks Linux for pages as they are touched, not whole huge pages around them, most of which nobody uses.
fn small_pages() {
    // SAFETY: this request takes numbers and changes nothing but the size of pages to come.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}
