// The generator of philox.py as a kernel for the CPU, bit for bit: what stands there as tensor operations stands here
// as loops over words, which the compiler turns into vector instructions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 64;     // blocks at a time, one per lane of a loop
constexpr int PIECE = 4096;   // values that one thread draws in one go
constexpr int ALONE = 8192;   // fewer blocks than this are not worth a second thread

struct Blocks {
    uint32_t word[4][LANES];
};

inline void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        uint64_t product0 = uint64_t(c[0]) * 0xD2511F53u, product1 = uint64_t(c[2]) * 0xCD9E8D57u;
        uint32_t next0 = uint32_t(product1 >> 32) ^ c[1] ^ k0, next2 = uint32_t(product0 >> 32) ^ c[3] ^ k1;
        c[0] = next0, c[1] = uint32_t(product1), c[2] = next2, c[3] = uint32_t(product0);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

inline void blocks(uint64_t seed, uint64_t counter, int lanes, Blocks &out) {
    for (int lane = 0; lane < lanes; ++lane) {
        uint64_t at = counter + uint64_t(lane);
        uint32_t c[4] = {uint32_t(at), uint32_t(at >> 32), 0, 0};
        philox(c, uint32_t(seed), uint32_t(seed >> 32));
        for (int i = 0; i < 4; ++i) out.word[i][lane] = c[i];
    }
}

template <int BITS> struct Uniform {
    float operator()(uint32_t word) const { return float(int32_t(word & ((1u << BITS) - 1))) / float(1 << BITS); }
};

struct Normal {
    const int64_t *table;

    float operator()(uint32_t word) const {
        float q = float(int32_t((word & 0x7FFFFF) << 1 | 1));
        int32_t q_bits;
        std::memcpy(&q_bits, &q, 4);
        int64_t entry = table[(q_bits >> 17) - (127 << 6)];
        uint64_t fall = uint64_t(uint32_t(entry & 0x3FFFFFF)) * uint32_t(q_bits & 0x1FFFF);
        // A branch on the sign would be mispredicted half of the time; the magnitude is never 0
        float sign = float(1 - int32_t(word >> 22 & 2));
        return float(((entry >> 26) << 17) - int64_t(fall)) * 0x1p-49f * sign;
    }
};

struct Piece {
    uint64_t seed, counter;
    int64_t count;
    float *out;
};

template <class Convert> inline void draw(const Blocks &drawn, int lanes, float *out, Convert convert) {
    for (int lane = 0; lane < lanes; ++lane)
        for (int i = 0; i < 4; ++i) out[4 * lane + i] = convert(drawn.word[i][lane]);
}

template <class Convert> void draw(const Piece &piece, Convert convert) {
    Blocks drawn;
    int64_t at = 0;
    for (; at + 4 * LANES <= piece.count; at += 4 * LANES) {
        blocks(piece.seed, piece.counter + uint64_t(at / 4), LANES, drawn);
        draw(drawn, LANES, piece.out + at, convert);
    }
    if (at < piece.count) {  // apart, so that the loops above have a fixed length
        float values[4 * LANES];
        int lanes = int((piece.count - at + 3) / 4);
        blocks(piece.seed, piece.counter + uint64_t(at / 4), lanes, drawn);
        draw(drawn, lanes, values, convert);
        std::memcpy(piece.out + at, values, size_t(piece.count - at) * sizeof(float));
    }
}

template <class Convert> void draw(const std::vector<Piece> &pieces, int threads, Convert convert) {
    // dynamic: a thread that starts late or is disturbed leaves its share to the others
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (size_t i = 0; i < pieces.size(); ++i) draw(pieces[i], convert);
}

}  // namespace

// Draws of each of `leaves` keys of each of `members`, from block `starts[leaf]` on, `counts[leaf]` values: uniforms of
// so many bits, or normals if bits is 0.
extern "C" void biofunc_draws(const int64_t *keys, int64_t members, int64_t leaves, const int64_t *starts,
                              const int64_t *counts, int bits, const int64_t *table, float *out, int threads) {
    std::vector<Piece> pieces;
    int64_t blocks = 0;
    for (int64_t member = 0; member < members; ++member)
        for (int64_t leaf = 0; leaf < leaves; ++leaf) {
            const int64_t *key = keys + 2 * (member * leaves + leaf);
            for (int64_t at = 0; at < counts[leaf]; at += PIECE) {
                int64_t count = std::min<int64_t>(PIECE, counts[leaf] - at);
                pieces.push_back({uint64_t(key[0]), uint64_t(key[1]) + uint64_t(starts[leaf] + at / 4), count, out});
                out += count;
                blocks += (count + 3) / 4;
            }
        }
    if (blocks < ALONE) threads = 1;
    if (bits == 0) draw(pieces, threads, Normal{table});
    if (bits == 8) draw(pieces, threads, Uniform<8>{});
    if (bits == 11) draw(pieces, threads, Uniform<11>{});
    if (bits == 24) draw(pieces, threads, Uniform<24>{});
}

// The keys that the blocks of `count` keys at counters high << 32 | low make, in one domain of counters.
extern "C" void biofunc_derive(const int64_t *keys, const int64_t *low, const int64_t *high, int64_t domain,
                               int64_t count, int64_t *out) {
    for (int64_t i = 0; i < count; ++i) {
        uint64_t seed = uint64_t(keys[2 * i]);
        uint64_t at = uint64_t(keys[2 * i + 1]) + (uint64_t(high[i]) << 32) + uint64_t(low[i]);
        uint32_t c[4] = {uint32_t(at), uint32_t(at >> 32), uint32_t(domain), 0};
        philox(c, uint32_t(seed), uint32_t(seed >> 32));
        out[2 * i] = int64_t(uint64_t(c[1]) << 32 | c[0]);
        out[2 * i + 1] = int64_t(uint64_t(c[3]) << 32 | c[2]);
    }
}
