// The namespace of the instruction set that this translation unit is compiled for.
#pragma once

#ifndef JAX_MPS_ISA  // an editor or clang-tidy reads a header by itself
#if defined(__x86_64__) || defined(_M_X64)
#define JAX_MPS_ISA x86_64_v2
#else
#define JAX_MPS_ISA baseline
#endif
#endif
