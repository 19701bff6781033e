// The entry of the static agent: relocates what the linker packed (DT_RELR), then enters musl's start code.
//
// Packed, the addresses in constants take 4 KB of the file instead of 110. musl knows the format since 1.2.4; Debian 12 has
// 1.2.3. A later one finds the table empty, because this code empties it. Runs before any relocation: it may use no address
// of its own but relative ones, and no library.
#include <elf.h>
#include <stddef.h>

#define HIDDEN __attribute__((visibility("hidden")))
extern HIDDEN char __ehdr_start[];
extern HIDDEN Elf64_Dyn _DYNAMIC[];

// The names of glibc's elf.h before 2.36.
enum { TAG_RELRSZ = 35, TAG_RELR = 36 };

// Adds the address that the program was loaded at to every word that the table names. An even entry is the place of a word;
// an odd one has a bit for each of the 63 words behind the last place.
HIDDEN void secure_comms_unpack(void) {
    const size_t base = (size_t)__ehdr_start;
    const size_t *table = NULL;
    size_t entries = 0;
    for (Elf64_Dyn *entry = _DYNAMIC; entry->d_tag != DT_NULL; entry++) {
        if (entry->d_tag == TAG_RELR) table = (const size_t *)(base + entry->d_un.d_ptr);
        if (entry->d_tag == TAG_RELRSZ) {
            entries = entry->d_un.d_val / sizeof(size_t);
            entry->d_un.d_val = 0;
        }
    }
    size_t *place = NULL;
    for (; entries > 0; entries--, table++) {
        if ((*table & 1) == 0) {
            place = (size_t *)(base + *table);
            *place++ += base;
        } else {
            for (size_t bits = *table >> 1, word = 0; bits != 0; bits >>= 1, word++)
                if (bits & 1) place[word] += base;
            place += 63;
        }
    }
}

// The stack is as the kernel made it when musl's start code gets it; rdx is what that may register with atexit.
__asm__(".globl secure_comms_start\n"
        ".hidden secure_comms_start\n"
        ".type secure_comms_start, @function\n"
        "secure_comms_start:\n"
        "    xor %ebp, %ebp\n"
        "    push %rdx\n"
        "    sub $8, %rsp\n"
        "    call secure_comms_unpack\n"
        "    add $8, %rsp\n"
        "    pop %rdx\n"
        "    jmp _start\n");
