// Programmatic launches (compute capability 9.0 on): a kernel launched so begins while those before it are still running.
//
// Before `follow` it reads nothing that a launch before it may have written, and writes nothing. Pointers to such data are not
// __restrict__: what is const as well could be read ahead of the wait. Whoever ends has waited for the launch before, so that
// all earlier ones have ended, too.
__device__ __forceinline__ void follow() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may begin when all blocks have called this or ended. Behind `follow`: what runs then has everything from two
// launches before it and earlier, which kernels of others may build on, and no third launch waits on the device. Attention does
// not call it: products that waited beside it made steps 1 % longer, 8 % where norms let the next begin before their wait
// (benchmarks/LOG.md).
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
