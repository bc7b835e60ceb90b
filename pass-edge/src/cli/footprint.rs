//! What the program keeps in memory between images. On other systems than Linux with glibc nothing here does anything.
#![cfg_attr(
    all(target_os = "linux", target_env = "gnu"),
    expect(unsafe_code, reason = "advice to the kernel and to the allocator goes through C functions")
)]

#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) use glibc::{forget_startup_code, return_large_blocks};

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn return_large_blocks() {}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn forget_startup_code() {}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use std::ffi::{c_int, c_void};

    /// Blocks of at least this size (pictures, files) go back to the kernel as soon as they are free. Left alone, the
    /// allocator raises its threshold with the first of them and keeps the rest for good.
    const LARGE_BLOCK: c_int = 64 << 10;
    /// Where pages start. Where they are larger, the kernel may refuse the advice, and nothing is lost.
    const PAGE: usize = 4096;

    /// Asks the allocator to return large blocks, and to serve all threads from one heap: they allocate next to nothing.
    pub(crate) fn return_large_blocks() {
        // SAFETY: `mallopt` takes two numbers and may be called at any time.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BLOCK);
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }

    /// Gives up the pages of code touched so far. Most ran once (linking, arguments, the check of the file) and stay out;
    /// what is needed again comes back from the page cache.
    pub(crate) fn forget_startup_code() {
        // SAFETY: `give_up` has the signature that is asked for and does not touch its last argument.
        unsafe { libc::dl_iterate_phdr(Some(give_up), std::ptr::null_mut()) };
    }

    /// Gives up the code of one loaded object.
    unsafe extern "C" fn give_up(object: *mut libc::dl_phdr_info, _: libc::size_t, _: *mut c_void) -> c_int {
        // SAFETY: the linker hands in a loaded object with its name and `dlpi_phnum` headers.
        let (object, headers) = unsafe {
            let object = &*object;
            (object, std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)))
        };
        for header in headers {
            let code =
                header.p_type == libc::PT_LOAD && header.p_flags & (libc::PF_X | libc::PF_W) == libc::PF_X;
            if !code {
                continue;
            }
            let start = object.dlpi_addr as usize + header.p_vaddr as usize;
            let first = start & !(PAGE - 1);
            let len = start - first + header.p_memsz as usize;
            // SAFETY: these pages are mapped from a file and never written; a touch reads them from there again.
            unsafe { libc::madvise(first as *mut c_void, len, libc::MADV_DONTNEED) };
        }
        0
    }
}
