//! What the program asks of its allocator.
#![expect(unsafe_code, reason = "options of mimalloc and of the kernel are set through C interfaces")]

use mimalloc as _; // linked even where it is not the global allocator
use std::ffi::{c_int, c_long};

/// `mi_option_purge_delay` of mimalloc 2 and 3.
const PURGE_DELAY: c_int = 15;
/// Never.
const NEVER: c_long = -1;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
}

/// Keeps freed memory instead of returning it to the system: every training step allocates the same buffers, and the
/// system would clear each page again. In return Linux is asked to give pages as they are touched, not whole huge pages
/// around them, which would be kept as well.
pub fn keep_memory() {
    // SAFETY: the function of the linked mimalloc takes two integers, at any time.
    unsafe { mi_option_set(PURGE_DELAY, NEVER) };
    // SAFETY: this request takes numbers and changes nothing but the size of pages to come.
    #[cfg(target_os = "linux")]
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}
