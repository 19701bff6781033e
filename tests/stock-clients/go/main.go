// Pipes standard input and output through a tunnel, with golang.org/x/crypto/ssh.
//
// Arguments: HOST PORT USER KEY_FILE HOST_KEY_LINE TUNNEL; HOST_KEY_LINE is the only host key to accept, as in a .pub
// file.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/crypto/ssh"
)

func run(args []string) error {
	if len(args) != 6 {
		return fmt.Errorf("expected 6 arguments, got %d", len(args))
	}
	host, port, user, keyFile, hostKeyLine, tunnel := args[0], args[1], args[2], args[3], args[4], args[5]
	pem, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return err
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(hostKeyLine))
	if err != nil {
		return err
	}
	client, err := ssh.Dial("tcp", net.JoinHostPort(host, port), &ssh.ClientConfig{
		User:              user,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback:   ssh.FixedHostKey(hostKey),
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		Timeout:           20 * time.Second,
	})
	if err != nil {
		return err
	}
	defer client.Close()
	request := struct {
		Host       string
		Port       uint32
		Originator string
		From       uint32
	}{tunnel, 1, "127.0.0.1", 0}
	stream, requests, err := client.OpenChannel("direct-tcpip", ssh.Marshal(&request))
	if err != nil {
		return err
	}
	go ssh.DiscardRequests(requests)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(stream, os.Stdin)
		if err == nil {
			err = stream.CloseWrite()
		}
		sent <- err
	}()
	if _, err := io.Copy(os.Stdout, stream); err != nil {
		return err
	}
	return <-sent
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
