// Python bindings: they trust nothing about shapes, release the GIL and call the chosen table.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
using namespace fwdllm;

namespace {

template <typename T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Bytes = In<uint8_t, 2>;
using Vector = In<float, 1>;
using Matrix = In<float, 2>;

void require(bool ok, const char* what) {
    if (!ok) throw nb::value_error(what);
}

int distribution_code(const std::string& name) {
    if (name == "normal") return kNormal;
    if (name == "rademacher") return kRademacher;
    throw nb::value_error("distribution is 'normal' or 'rademacher'");
}

double peak(const std::string& kind) {
    const char* kinds[] = {"int8", "bf16", "fp32", "read"};
    for (int i = 0; i < 4; ++i) {
        if (kind != kinds[i]) continue;
        nb::gil_scoped_release release_gil;
        return kernels().peak((Peak)i);
    }
    throw nb::value_error("kind is 'int8', 'bf16', 'fp32' or 'read'");
}

struct BlockSize {
    int64_t elements;
    size_t bytes;
};

BlockSize block_size(int type) {
    switch (type) {
        case F32:
            return {1, 4};
        case F16:
        case BF16:
            return {1, 2};
        case Q4_0:
            return {32, 18};
        case Q4_1:
            return {32, 20};
        case Q8_0:
            return {32, 34};
        case Q4_K:
            return {256, 144};
        case Q5_K:
            return {256, 176};
        case Q6_K:
            return {256, 210};
    }
    throw nb::value_error("unsupported tensor type");
}

Weight weight_of(const Bytes& data, int type, int64_t n_in) {
    const BlockSize block = block_size(type);
    require(n_in > 0 && n_in % block.elements == 0, "a row is not whole blocks");
    const size_t row_bytes = (size_t)(n_in / block.elements) * block.bytes;
    require(data.shape(1) == row_bytes, "the bytes of a row do not fit its type and length");
    return {data.data(), type, (int64_t)data.shape(0), n_in, row_bytes};
}

void philox(uint64_t seed, uint64_t start, Out<uint32_t, 2> out) {
    require(out.shape(1) == 4, "out is [count, 4]");
    nb::gil_scoped_release release_gil;
    kernels().philox(seed, start, (int64_t)out.shape(0), out.data());
}

void random_values(const std::string& distribution, uint64_t seed, uint64_t start,
                   Out<float, 1> out) {
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().random_values(code, seed, start, (int64_t)out.shape(0), out.data());
}

void seeded_axpy(Out<float, 1> theta, In<uint64_t, 1> seeds, Vector coefficients, uint64_t offset,
                 const std::string& distribution) {
    require(seeds.shape(0) == coefficients.shape(0), "one coefficient per seed");
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().seeded_axpy(theta.data(), (int64_t)theta.shape(0), seeds.data(), coefficients.data(),
                          (int64_t)seeds.shape(0), offset, code);
}

void seeded_dot(Vector g, In<uint64_t, 1> seeds, uint64_t offset, const std::string& distribution,
                Out<double, 1> out) {
    require(seeds.shape(0) == out.shape(0), "one result per seed");
    const int code = distribution_code(distribution);
    nb::gil_scoped_release release_gil;
    kernels().seeded_dot(g.data(), (int64_t)g.shape(0), seeds.data(), (int64_t)seeds.shape(0),
                         offset, code, out.data());
}

void gather(Bytes data, int type, int64_t n_in, In<int32_t, 1> ids, Out<float, 2> out) {
    const Weight w = weight_of(data, type, n_in);
    require(out.shape(0) == ids.shape(0) && (int64_t)out.shape(1) == n_in, "out is [rows, n_in]");
    for (size_t i = 0; i < ids.shape(0); ++i)
        require(ids.data()[i] >= 0 && ids.data()[i] < w.n_out, "an id is outside the table");
    nb::gil_scoped_release release_gil;
    kernels().gather(w, ids.data(), (int64_t)ids.shape(0), out.data());
}

// Rows may only refer to earlier ones, and those to themselves.
const int32_t* references_of(const In<int32_t, 1>& references, size_t rows) {
    const int32_t* r = references.data();
    require(references.shape(0) == rows, "one reference a row");
    for (size_t i = 0; i < rows; ++i)
        require(r[i] >= 0 && r[i] <= (int64_t)i && r[r[i]] == r[i],
                "a reference is not an earlier row");
    return r;
}

// mask: None or [size], basis: None or [n_basis, width].
FactorDirection direction_of(uint64_t offset, const nb::object& mask, const nb::object& basis,
                             int64_t width) {
    FactorDirection d{offset, nullptr, false, nullptr, 0};
    if (!mask.is_none()) d.mask = nb::cast<Vector>(mask, false).data();
    if (!basis.is_none()) {
        const Matrix vectors = nb::cast<Matrix>(basis, false);
        require((int64_t)vectors.shape(1) == width, "a basis does not fit its factor");
        d.in_subspace = true;
        d.basis = vectors.data();
        d.n_basis = (int64_t)vectors.shape(0);
    }
    return d;
}

// tangents: rows are 1 + tangents equal slices.
void require_tangents(size_t rows, int64_t tangents) {
    require(tangents >= 0 && rows % (1 + tangents) == 0, "the rows are not a primal and tangents");
}

Lanes lanes_of(size_t rows, const In<uint64_t, 2>& seeds, const Vector& coefficients,
               const In<int32_t, 1>& starts, const std::string& distribution, bool tangents) {
    require(seeds.shape(0) > 0 && seeds.shape(0) == coefficients.shape(0),
            "one coefficient per lane");
    require(rows % seeds.shape(0) == 0, "the rows are not whole lanes");
    const Lanes lanes{
        seeds.data(), coefficients.data(), (int64_t)seeds.shape(0), distribution_code(distribution),
        tangents,     starts.data(),       (int64_t)seeds.shape(1)};
    require(starts.shape(0) == seeds.shape(1) + 1 && starts.data()[0] == 0 &&
                starts.data()[lanes.n_parts] == (int64_t)rows / lanes.n,
            "parts are not the rows of a lane");
    for (int64_t p = 0; p < lanes.n_parts; ++p)
        require(starts.data()[p] <= starts.data()[p + 1], "parts do not ascend");
    require(!tangents || coefficients.data()[0] == 0, "lane 0 is not plain");
    return lanes;
}

// (A, B, scale, offset, offset of B, mask of A, mask of B, basis of A, basis of B).
using LoraArguments = std::tuple<Matrix, Matrix, float, uint64_t, uint64_t, nb::object, nb::object,
                                 nb::object, nb::object>;

LoRA lora_of(const LoraArguments& arguments, int64_t n_in, int64_t n_out) {
    const auto& [factor_a, factor_b, scale, offset_a, offset_b, mask_a, mask_b, basis_a, basis_b] =
        arguments;
    const int64_t rank = (int64_t)factor_a.shape(0);
    require(rank > 0 && (int64_t)factor_a.shape(1) == n_in, "A is [rank, n_in]");
    require((int64_t)factor_b.shape(0) == n_out && (int64_t)factor_b.shape(1) == rank,
            "B is [n_out, rank]");
    for (const auto& [mask, size] :
         {std::pair(mask_a, factor_a.size()), std::pair(mask_b, factor_b.size())})
        require(mask.is_none() || nb::cast<Vector>(mask).shape(0) == size,
                "a mask does not fit its factor");
    return {factor_a.data(),
            factor_b.data(),
            scale,
            rank,
            direction_of(offset_a, mask_a, basis_a, n_in),
            direction_of(offset_b, mask_b, basis_b, n_out)};
}

// lora: None or LoraArguments.
void matmul(Matrix x, Bytes data, int type, In<int32_t, 1> references, nb::object bias,
            nb::object lora, In<uint64_t, 2> seeds, Vector coefficients, In<int32_t, 1> starts,
            const std::string& distribution, bool tangents, bool exact, Out<float, 2> y) {
    const Weight w = weight_of(data, type, (int64_t)x.shape(1));
    const int32_t* r = references_of(references, x.shape(0));
    require(y.shape(0) == x.shape(0) && (int64_t)y.shape(1) == w.n_out, "y is [rows, n_out]");
    const Lanes lanes = lanes_of(x.shape(0), seeds, coefficients, starts, distribution, tangents);
    const float* b = nullptr;
    if (!bias.is_none()) {
        const Vector v = nb::cast<Vector>(bias);
        require((int64_t)v.shape(0) == w.n_out, "bias is [n_out]");
        b = v.data();
    }
    LoRA term{};
    if (!lora.is_none()) term = lora_of(nb::cast<LoraArguments>(lora), w.n_in, w.n_out);
    nb::gil_scoped_release release_gil;
    kernels().matmul(x.data(), (int64_t)x.shape(0), r, w, b, lora.is_none() ? nullptr : &term,
                     lanes, exact, y.data());
}

void add_lora(Matrix x, const LoraArguments& lora, In<uint64_t, 2> seeds, Vector coefficients,
              In<int32_t, 1> starts, const std::string& distribution, bool tangents,
              Out<float, 2> y) {
    require(y.shape(0) == x.shape(0), "y is [rows, n_out]");
    const int64_t n_in = (int64_t)x.shape(1), n_out = (int64_t)y.shape(1);
    const LoRA term = lora_of(lora, n_in, n_out);
    const Lanes lanes = lanes_of(x.shape(0), seeds, coefficients, starts, distribution, tangents);
    nb::gil_scoped_release release_gil;
    kernels().add_lora(x.data(), (int64_t)x.shape(0), n_in, n_out, term, lanes, y.data());
}

void to_relative(Out<float, 2> x, In<int32_t, 1> references, Out<float, 1> scales) {
    const int32_t* r = references_of(references, x.shape(0));
    require(scales.shape(0) == x.shape(0), "one scale a row");
    nb::gil_scoped_release release_gil;
    kernels().to_relative(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), r, scales.data());
}

void from_relative(Out<float, 2> y, In<int32_t, 1> references, Vector scales) {
    const int32_t* r = references_of(references, y.shape(0));
    require(scales.shape(0) == y.shape(0), "one scale a row");
    nb::gil_scoped_release release_gil;
    kernels().from_relative(y.data(), (int64_t)y.shape(0), (int64_t)y.shape(1), r, scales.data());
}

void cross_entropy(Matrix x, Bytes data, int type, In<int32_t, 1> references, int64_t tangents,
                   In<int32_t, 1> labels, bool exact, Out<double, 1> nll) {
    require_tangents(x.shape(0), tangents);
    const Weight w = weight_of(data, type, (int64_t)x.shape(1));
    const int32_t* refs = references_of(references, x.shape(0));
    require(labels.shape(0) == x.shape(0) && nll.shape(0) == x.shape(0),
            "one label and result a row");
    for (size_t i = 0; i < labels.shape(0); ++i)
        require(labels.data()[i] >= 0 && labels.data()[i] < w.n_out,
                "a label is outside the vocabulary");
    nb::gil_scoped_release release_gil;
    kernels().cross_entropy(x.data(), (int64_t)x.shape(0), refs, tangents, w, labels.data(), exact,
                            nll.data());
}

void rms_norm(Matrix x, Vector weight, float eps, int64_t tangents, Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(weight.shape(0) == x.shape(1) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
            "x and y are [rows, d], weight is [d]");
    nb::gil_scoped_release release_gil;
    kernels().rms_norm(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), weight.data(), eps,
                       tangents, y.data());
}

void layer_norm(Matrix x, Vector weight, Vector bias, float eps, int64_t tangents,
                Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(weight.shape(0) == x.shape(1) && bias.shape(0) == x.shape(1) &&
                y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
            "x and y are [rows, d], weight and bias are [d]");
    nb::gil_scoped_release release_gil;
    kernels().layer_norm(x.data(), (int64_t)x.shape(0), (int64_t)x.shape(1), weight.data(),
                         bias.data(), eps, tangents, y.data());
}

void rope(Matrix x, In<int32_t, 1> positions, Matrix cos, Matrix sin, int64_t head_dim,
          bool interleaved, Out<float, 2> y) {
    const int64_t half = (int64_t)cos.shape(1), width = (int64_t)x.shape(1);
    require(head_dim > 0 && width % head_dim == 0 && 2 * half <= head_dim,
            "rows are not whole heads");
    require(sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1),
            "cos and sin differ in shape");
    require(
        positions.shape(0) == x.shape(0) && y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1),
        "one position a row");
    for (size_t i = 0; i < positions.shape(0); ++i)
        require(positions.data()[i] >= 0 && positions.data()[i] < (int64_t)cos.shape(0),
                "a position is outside the table");
    nb::gil_scoped_release release_gil;
    kernels().rope(x.data(), (int64_t)x.shape(0), width, head_dim, half, positions.data(),
                   cos.data(), sin.data(), interleaved, y.data());
}

void swiglu(Matrix gate, Matrix up, int64_t tangents, Out<float, 2> y) {
    require_tangents(gate.shape(0), tangents);
    require(gate.size() == up.size() && gate.size() == y.size(), "gate, up and y differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().swiglu(gate.data(), up.data(), (int64_t)gate.size(), tangents, y.data());
}

void gelu(Matrix x, int64_t tangents, Out<float, 2> y) {
    require_tangents(x.shape(0), tangents);
    require(x.size() == y.size(), "x and y differ in shape");
    nb::gil_scoped_release release_gil;
    kernels().gelu(x.data(), (int64_t)x.size(), tangents, y.data());
}

void attention(Matrix q, Matrix k, Matrix v, In<int32_t, 1> starts, int64_t head_dim, float scale,
               bool causal, int64_t tangents, Out<float, 2> y) {
    const int64_t rows = (int64_t)q.shape(0), n_seq = (int64_t)starts.shape(0) - 1;
    require(head_dim > 0 && q.shape(1) % head_dim == 0 && k.shape(1) % head_dim == 0,
            "rows are not whole heads");
    const int64_t n_heads = (int64_t)q.shape(1) / head_dim, n_kv = (int64_t)k.shape(1) / head_dim;
    require(n_kv > 0 && n_heads % n_kv == 0, "query heads are not a multiple of key/value heads");
    require((int64_t)k.shape(0) == rows && (int64_t)v.shape(0) == rows &&
                v.shape(1) == k.shape(1) && (int64_t)y.shape(0) == rows && y.shape(1) == q.shape(1),
            "q, k, v and y differ in shape");
    require(n_seq >= 0 && starts.data()[0] == 0 && starts.data()[n_seq] == rows,
            "starts run from 0 to the number of rows");
    for (int64_t s = 0; s < n_seq; ++s)
        require(starts.data()[s] < starts.data()[s + 1], "starts do not ascend");
    require(tangents >= 0 && n_seq % (1 + tangents) == 0, "tangents have other sequences");
    const int64_t n_primal = n_seq / (1 + tangents), primal = rows / (1 + tangents);
    for (int64_t s = 0; s + n_primal <= n_seq; ++s)
        require(starts.data()[s] + primal == starts.data()[s + n_primal],
                "tangents have other sequences");
    nb::gil_scoped_release release_gil;
    kernels().attention(q.data(), k.data(), v.data(), starts.data(), n_seq, n_heads, n_kv, head_dim,
                        scale, causal, tangents, y.data());
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("isa") = kernels().name;
    m.attr("isas") = nb::tuple(nb::cast(isa_names()));
#if defined(__clang__)
    m.attr("compiler") = "Clang " __clang_version__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.def("peak", &peak);
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", [](int n) {
        require(n >= 1, "at least one thread");
        set_num_threads(n);
    });
    m.def("philox", &philox);
    m.def("random_values", &random_values);
    // theta is changed in place: converting it would change a copy.
    m.def("seeded_axpy", &seeded_axpy, nb::arg().noconvert(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg());
    m.def("seeded_dot", &seeded_dot);
    m.def("gather", &gather);
    m.def("matmul", &matmul, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
          nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg());
    // y or x is changed in place: converting it would change a copy.
    m.def("add_lora", &add_lora, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg().noconvert());
    m.def("to_relative", &to_relative, nb::arg().noconvert(), nb::arg(), nb::arg().noconvert());
    m.def("from_relative", &from_relative, nb::arg().noconvert(), nb::arg(), nb::arg());
    m.def("cross_entropy", &cross_entropy);
    m.def("rms_norm", &rms_norm);
    m.def("layer_norm", &layer_norm);
    m.def("rope", &rope);
    m.def("swiglu", &swiglu);
    m.def("gelu", &gelu);
    m.def("attention", &attention);
}
