//! The heap in use, for benchmarks that print it.

/// Bytes in use on the heap, the allocator's own included.
pub(crate) fn heap() -> usize {
    // SAFETY: it has no arguments and only reads.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

#[expect(clippy::cast_precision_loss, reason = "to be read by people")]
pub(crate) fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
