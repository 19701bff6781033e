# Resource policy of Trustee's KBS for Secure Comms. deploy/README.md says how to install it.
#
# A pod's keys are the resource default/pp-<pod id>/<d>. d is the first half of a SHA-512, two thirds of a SHA-384, or all
# of a SHA-256: the first 32 bytes of the digest of the init-data that the worker node expects of the pod's VM, in lower-case
# hex. Only a VM whose evidence names that init-data may read the resource.
#
# The whole init-data is compared, not an id in it: whoever starts a VM chooses its init-data, and can write any pod's id
# into it. Two VMs with the same image and the same init-data can read each other's keys.
#
# Everything is refused that no rule here allows: also evidence, or a path, of a form that this file does not know.

package policy

import rego.v1

# What an operator may change
# ---------------------------

# What the attestation service must say of every part of the VM (`ear.status`).
# "affirming": everything fits the reference values, which must be registered for that. With "warning" Trustee's default
# policy lets any image in, also one without Secure Comms, as long as the hardware is genuine: the status of an image with
# unknown measurements is "warning". Add "warning" only with an attestation policy that says otherwise.
accepted_status := {"affirming"}

# Whether VMs may read default/pp-<pod id>/keys: the keys of pods for which the worker node expects no init-data. Any VM
# with an accepted status can then take the place of any such pod.
allow_unbound := false

# Whether VMs may read default/pp-<pod id>/privateKey, for agents before version 0.2. With the same consequence.
allow_old_agents := false

# Whether evidence of Trustee's sample attester counts. Anyone can forge it: for experiments only.
allow_sample := false

# Whether the register HOST_DATA of an Azure SEV-SNP VM counts as its init-data. Older versions of Trustee report it, in
# base64, for az-snp-vtpm. The hypervisor sets it, and the guest components do not compare it with the init-data: switched
# on, this protects the pods from other tenants, but not from Azure.
allow_azure_host_data := false

# Resources that are no pod's keys. As shipped: evidence from hardware with an accepted status, no less than Trustee's own
# policies require. Write here what your cluster needs; pods' keys never pass through this rule.
other_resources if proven

# The decision
# ------------

default allow := false

allow if {
	pod_keys
	bound(resource[2])
}

allow if {
	pod_keys
	resource[2] == "keys"
	allow_unbound
	proven
}

allow if {
	pod_keys
	resource[2] == "privateKey"
	allow_old_agents
	proven
}

allow if {
	type := lower(resource[1])
	not startswith(type, "pp-")
	other_resources
}

pod_keys if {
	resource[0] == "default"
	regex.match(`^pp-[A-Za-z0-9][A-Za-z0-9._-]*$`, resource[1])
}

# The resource
# ------------

# Repository, type and tag. Trustee hands over the path in one of three forms.
resource := path if {
	count(path) == 3
	every part in path {
		is_string(part)
		regex.match(`^[A-Za-z0-9_-]+[A-Za-z0-9_.-]*$`, part)
	}
}

# An array: v0.17 and later.
path := data["resource-path"] if {
	data.plugin == "resource"
	is_array(data["resource-path"])
}

# /default/pp-x/y, and the name of the plugin by itself.
path := array.slice(parts, 1, count(parts)) if {
	data.plugin == "resource"
	is_string(data["resource-path"])
	parts := split(data["resource-path"], "/")
	parts[0] == ""
}

# resource/default/pp-x/y: v0.15 and older.
path := array.slice(parts, 1, count(parts)) if {
	not data.plugin
	is_string(data["resource-path"])
	parts := split(data["resource-path"], "/")
	parts[0] == "resource"
}

# The evidence
# ------------

# The claims of the attestation token. Newer versions of Trustee wrap them.
token := input if not input.trust_context

token := summary.claims if {
	not input.submods
	summary := input.trust_context.attestation_summary
	summary.verification_result == true
}

# The parts of the VM: its CPU, GPUs and other devices. Every one has an accepted status, and exactly one is a CPU.
proven if {
	is_object(token.submods)
	cpus := [name | some name, _ in token.submods; startswith(lower(name), "cpu")]
	cpus == ["cpu0"]
	every part in token.submods {
		part["ear.status"] in accepted_status
		is_object(part["ear.veraison.annotated-evidence"])
	}
	not forgeable
}

# Evidence of the sample attester for CPUs or for devices.
forgeable if {
	not allow_sample
	some part in token.submods
	some name in object.keys(part["ear.veraison.annotated-evidence"])
	startswith(name, "sample")
}

claims := token.submods.cpu0["ear.veraison.annotated-evidence"]

# The TEEs whose claims about init-data this file can read.
tee := name if {
	names := {name | some name in ["az-snp-vtpm", "az-tdx-vtpm", "sample", "snp", "tdx"]; is_object(claims[name])}
	count(names) == 1
	some name in names
}

# The init-data
# -------------

# d: 64 hex digits. A VM without init-data has only zeros in the registers of its hardware.
bound(d) if {
	regex.match(`^[0-9a-f]{64}$`, d)
	d != "0000000000000000000000000000000000000000000000000000000000000000"
	proven
	is_string(claims.init_data)
	named(d)
}

# SEV-SNP: the register HOST_DATA has 32 bytes.
named(d) if {
	tee == "snp"
	claims.init_data == d
}

# TDX: the register MRCONFIGID has 48 bytes: those of a longer digest, or zeros after a SHA-256. Which of the two, d does
# not say: the guest components compare all 48 bytes with the init-data, and 32 bytes of a digest are enough to bind it.
named(d) if {
	tee == "tdx"
	regex.match(`^[0-9a-f]{96}$`, claims.init_data)
	startswith(claims.init_data, d)
}

# Azure: the guest extends PCR 8 of the vTPM with the digest's first 32 bytes, and the claim is the PCR.
named(d) if {
	tee in {"az-snp-vtpm", "az-tdx-vtpm"}
	claims.init_data == claims[tee].tpm.pcr08
	claims.init_data == extended(d)
}

named(d) if {
	tee == "az-snp-vtpm"
	allow_azure_host_data
	from_base64(claims.init_data) == d
}

named(d) if {
	tee == "sample"
	from_base64(claims.init_data) == d
}

# The first 32 bytes in hex of 32, 48 or 64 bytes in base64. (base64.decode makes text of them, and loses bytes that are
# not UTF-8.)
from_base64(encoded) := substring(concat("", groups), 0, 64) if {
	regex.match(
		`^([A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=|[A-Za-z0-9+/]{64}|[A-Za-z0-9+/]{85}[AQgw]==)$`,
		encoded,
	)
	groups := [sprintf("%06x", [group]) |
		some at in [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
		group := sum([bits.lsh(sextet, 18 - (6 * i)) |
			some i in [0, 1, 2, 3]
			sextet := indexof(base64_alphabet, replace(substring(encoded, at + i, 1), "=", "A"))
		])
	]
}

base64_alphabet := "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

# SHA-256, because Trustee's policies have no function for it
# -----------------------------------------------------------

# A PCR of zeros, extended with 32 bytes: the SHA-256 of 32 zero bytes and d (FIPS 180-4). 64 bytes are one block, and the
# padding is another.
extended(d) := concat("", digits) if {
	block := array.concat([0, 0, 0, 0, 0, 0, 0, 0], [word |
		some at in [0, 8, 16, 24, 32, 40, 48, 56]
		word := sum([bits.lsh(digit, 28 - (4 * i)) |
			some i in [0, 1, 2, 3, 4, 5, 6, 7]
			digit := indexof("0123456789abcdef", substring(d, at + i, 1))
		])
	])
	padding := [2147483648, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 512]
	hash := compress(compress(sha256_start, block), padding)
	digits := [sprintf("%08x", [word]) | some word in hash]
}

sha256_start := [
	1779033703, 3144134277, 1013904242, 2773480762, 1359893119, 2600822924, 528734635, 1541459225,
]

sha256_constants := [
	1116352408, 1899447441, 3049323471, 3921009573, 961987163, 1508970993, 2453635748, 2870763221,
	3624381080, 310598401, 607225278, 1426881987, 1925078388, 2162078206, 2614888103, 3248222580,
	3835390401, 4022224774, 264347078, 604807628, 770255983, 1249150122, 1555081692, 1996064986,
	2554220882, 2821834349, 2952996808, 3210313671, 3336571891, 3584528711, 113926993, 338241895,
	666307205, 773529912, 1294757372, 1396182291, 1695183700, 1986661051, 2177026350, 2456956037,
	2730485921, 2820302411, 3259730800, 3345764771, 3516065817, 3600352804, 4094571909, 275423344,
	430227734, 506948616, 659060556, 883997877, 958139571, 1322822218, 1537002063, 1747873779,
	1955562222, 2024104815, 2227730452, 2361852424, 2428436474, 2756734187, 3204031479, 3329325298,
]

compress(state, block) := added if {
	block1 := next_words(block)
	block2 := next_words(block1)
	block3 := next_words(block2)
	words := array.concat(array.concat(block, block1), array.concat(block2, block3))
	inputs := [sum([word, sha256_constants[i]]) | some i, word in words]
	half := rounds(rounds(rounds(rounds(state, inputs, 0), inputs, 8), inputs, 16), inputs, 24)
	last := rounds(rounds(rounds(rounds(half, inputs, 32), inputs, 40), inputs, 48), inputs, 56)
	added := [add(a, last[i]) | some i, a in state]
}

# Rego has no loops that carry a value on.
rounds(s, inputs, at) := s8 if {
	s1 := round(s, inputs[at])
	s2 := round(s1, inputs[at + 1])
	s3 := round(s2, inputs[at + 2])
	s4 := round(s3, inputs[at + 3])
	s5 := round(s4, inputs[at + 4])
	s6 := round(s5, inputs[at + 5])
	s7 := round(s6, inputs[at + 6])
	s8 := round(s7, inputs[at + 7])
}

round(s, word) := [add(t, sigma + majority), s[0], s[1], s[2], add(s[3], t), s[4], s[5], s[6]] if {
	choice := bits.xor(s[6], bits.and(s[4], bits.xor(s[5], s[6])))
	t := ((s[7] + xor3(rotate(s[4], 6), rotate(s[4], 11), rotate(s[4], 25))) + choice) + word
	sigma := xor3(rotate(s[0], 2), rotate(s[0], 13), rotate(s[0], 22))
	majority := xor3(bits.and(s[0], s[1]), bits.and(s[0], s[2]), bits.and(s[1], s[2]))
}

# The 16 words of the schedule that follow 16 of them.
next_words(w) := [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15] if {
	w0 := next_word(w[0], w[1], w[9], w[14])
	w1 := next_word(w[1], w[2], w[10], w[15])
	w2 := next_word(w[2], w[3], w[11], w0)
	w3 := next_word(w[3], w[4], w[12], w1)
	w4 := next_word(w[4], w[5], w[13], w2)
	w5 := next_word(w[5], w[6], w[14], w3)
	w6 := next_word(w[6], w[7], w[15], w4)
	w7 := next_word(w[7], w[8], w0, w5)
	w8 := next_word(w[8], w[9], w1, w6)
	w9 := next_word(w[9], w[10], w2, w7)
	w10 := next_word(w[10], w[11], w3, w8)
	w11 := next_word(w[11], w[12], w4, w9)
	w12 := next_word(w[12], w[13], w5, w10)
	w13 := next_word(w[13], w[14], w6, w11)
	w14 := next_word(w[14], w[15], w7, w12)
	w15 := next_word(w[15], w0, w8, w13)
}

next_word(w16, w15, w7, w2) := add((w16 + w7) + sigma0, sigma1) if {
	sigma0 := xor3(rotate(w15, 7), rotate(w15, 18), bits.rsh(w15, 3))
	sigma1 := xor3(rotate(w2, 17), rotate(w2, 19), bits.rsh(w2, 10))
}

# Of 32 bits.
add(a, b) := bits.and(a + b, 4294967295)

rotate(word, by) := bits.and(bits.or(bits.rsh(word, by), bits.lsh(word, 32 - by)), 4294967295)

xor3(a, b, c) := bits.xor(bits.xor(a, b), c)
